//! What a daemon's log says of restores, and the VMMs of real guests that it was about.

use std::fs;
use std::time::Duration;

use super::api::Api;
use super::place::Place;
use super::procs::{self, Process};
use super::wait_for;

/// Waits until VMMs wait: two for anybody, and one for the sandbox that is paused.
pub(crate) fn wait_for_vmm(api: &Api) {
    wait_for("a VMM waits for it", Duration::from_secs(30), || {
        let text = api.get("/metrics").expect(200);
        text.as_str()?
            .contains("thaw_vmms_waiting 3\n")
            .then_some(())
    });
}

/// The lines, in their order.
fn lines(place: &Place) -> Vec<String> {
    let log = fs::read_to_string(&place.log).unwrap();
    let lines = log.lines().filter(|line| line.contains("Restored"));
    lines.map(str::to_owned).collect()
}

/// At least so many restores found a VMM that waited, or none did.
#[track_caller]
pub(crate) fn found_one_waiting(place: &Place, at_least: Option<usize>) {
    let lines = lines(place);
    let found = lines
        .iter()
        .filter(|line| line.contains("was_waiting=true"));
    let found = found.count();
    println!("{lines:#?}");
    match at_least {
        Some(least) => assert!(found >= least, "{found} of {}", lines.len()),
        None => assert_eq!(found, 0),
    }
}

/// The VMM of the last restore.
#[track_caller]
pub(crate) fn vmm(place: &Place) -> Process {
    let lines = lines(place);
    let last = lines.last().expect("a restore is logged");
    let pid = last.split(" pid=").nth(1).unwrap();
    let pid: i32 = pid.split(' ').next().unwrap().parse().unwrap();
    let is_it = |process: &Process| process.is_vmm() && process.pid == pid;
    let vmm = procs::of(place).into_iter().find(is_it);
    vmm.expect("its VMM runs")
}
