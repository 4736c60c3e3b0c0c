//! What a guest frees leaves its RAM file, and the builds of its pauses; what it keeps stays, and
//! what it takes back is its own, while engines come and go.
//!
//! A guest reports free memory two seconds after it has seen some, in blocks of megabytes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use serde_json::Value;

use crate::support::api::Api;
use crate::support::daemon::{Daemon, run};
use crate::support::needs::{self, TestedVmm};
use crate::support::place::Place;
use crate::support::workload::Workload;
use crate::support::{guest_mb, procs, skip, wait_for};

/// For a guest that is emulated on a busy host.
const PATIENCE: Duration = Duration::from_secs(90);
/// What is put into memory and freed again.
const FREED_MB: u64 = 96;
/// How much of that has to go: the rest is in smaller blocks, or in use again.
const GONE_MB: u64 = 40;
/// What a guest may give back of its own accord.
const OTHERS_MB: u64 = 16;

/// What the RAM file of a guest takes, in MiB.
fn ram_mb(place: &Place, id: &str) -> u64 {
    let vmm = procs::vmm(place, id).expect("a VMM");
    let files = fs::read_dir(format!("/proc/{}/fd", vmm.pid)).unwrap();
    let ram = files.flatten().find_map(|file| {
        let target = fs::read_link(file.path()).ok()?;
        let metadata = fs::metadata(file.path()).ok()?;
        let is_ram =
            target.to_string_lossy().starts_with("/memfd:") && metadata.len() == guest_mb() << 20;
        is_ram.then_some(metadata)
    });
    (ram.expect("a RAM file").blocks() * 512) >> 20
}

/// Waits until the RAM file is no larger than this.
#[track_caller]
fn shrinks_to(place: &Place, id: &str, most_mb: u64) {
    let mut least = u64::MAX;
    wait_for(&format!("it has {most_mb} MiB"), PATIENCE, || {
        let now = ram_mb(place, id);
        if now < least {
            println!("{id} has {now} MiB");
            least = now;
        }
        (now <= most_mb).then_some(())
    });
}

/// The pages of a build that are not zero, whoever stores them, in MiB.
fn stored_mb(place: &Place, paused: &Value) -> u64 {
    let dir = place.build(paused["build"].as_str().unwrap());
    let output = run(&["snapshot", "inspect", dir.to_str().unwrap(), "--json"]);
    assert!(output.status.success(), "{output:?}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let pages = |key: &str| found[key].as_u64().unwrap();
    (pages("own_pages") + pages("inherited_pages")) >> 8
}

/// Fills a file in the guest's memory; its hash.
#[track_caller]
fn fill(api: &Api, file: &str, megabytes: u64) -> String {
    api.shell(
        "one",
        &format!(
            "dd if=/dev/urandom of={file} bs=1M count={megabytes} 2>/dev/null && sha256sum < {file}"
        ),
    )
}

#[track_caller]
fn hash(api: &Api, id: &str, file: &str) -> String {
    api.shell(id, &format!("sha256sum < {file}"))
}

fn kill_engine(place: &Place) {
    let engine = wait_for("an engine", PATIENCE, || procs::engine(place));
    engine.kill();
}

#[test]
fn guest_gives_back_what_it_frees() {
    const NAME: &str = "balloon::guest_gives_back_what_it_frees";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(NAME, &reason),
    };
    if let TestedVmm::Other(vmm, _) = needs::vmm() {
        return skip(NAME, &format!("{vmm} is looked at elsewhere"));
    }
    let _turn = needs::one_at_a_time();
    let place = Place::new("tballoon", 23, Some(&inputs));
    // All memory is being loaded while it is given back.
    place.reconfigure(&[("[engine]\n", "[engine]\nload_mib_per_s = 8\n")]);
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    api.create("one", "base");
    api.shell("one", "mount -o remount,size=192m /run");
    let mut work = Workload::start(api, "one", 16);

    // Booted: nobody serves its memory.
    fill(api, "/run/freed", FREED_MB);
    let full = ram_mb(&place, "one");
    assert!(full > FREED_MB, "{full}");
    api.shell("one", "rm /run/freed");
    shrinks_to(&place, "one", full - GONE_MB);
    work.check(api, "one");
    let paused = api.pause("one").expect(200);
    let without = stored_mb(&place, &paused);
    assert!(without < full - GONE_MB / 2, "{without} of {full}");

    // In a build: freed while some of it is there after the resume, and some is not.
    api.resume("one").expect(200);
    work.check(api, "one");
    fill(api, "/run/freed", FREED_MB);
    let paused = api.pause("one").expect(200);
    let with = stored_mb(&place, &paused);
    assert!(with >= without + GONE_MB, "{with} after {without}");
    api.resume("one").expect(200);
    api.shell("one", "head -c 32M /run/freed | sha256sum; rm /run/freed");
    let paused = gone_from_builds(&place, api, with - GONE_MB);
    let stored = stored_mb(&place, &paused);
    println!("stored: {without}, {with} and {stored} MiB");
    work.check(api, "one");

    taken_back_while_engines_die(&place, api, &mut work);

    // A template's clones have what it has.
    api.snapshot("one", "tpl").expect(201);
    api.create("two", "tpl");
    work.clone().check(api, "two");
    work.check(api, "one");
    api.delete_all();
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}

/// Pauses until what was freed is in the build no more; the guest runs afterwards. What it never
/// had in memory leaves no trace in its RAM file.
fn gone_from_builds(place: &Place, api: &Api, most_mb: u64) -> Value {
    wait_for("it is in no build", PATIENCE, || {
        let paused = api.pause("one").expect(200);
        let stored = stored_mb(place, &paused);
        api.resume("one").expect(200);
        (stored <= most_mb).then_some(paused).or_else(|| {
            println!("stored: {stored} MiB");
            std::thread::sleep(Duration::from_secs(1));
            None
        })
    })
}

/// Fills again what was given back, with engines killed meanwhile; it goes through a pause, and is
/// freed again when all of it is there.
fn taken_back_while_engines_die(place: &Place, api: &Api, work: &mut Workload) {
    let again = std::thread::scope(|scope| {
        let filling = scope.spawn(|| fill(api, "/run/again", FREED_MB));
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(300));
            kill_engine(place);
        }
        filling.join().unwrap()
    });
    assert_eq!(hash(api, "one", "/run/again"), again);
    work.check(api, "one");
    work.change(api, "one");
    let paused = api.pause("one").expect(200);
    let stored = stored_mb(place, &paused);
    assert!(stored > FREED_MB, "{stored}");
    api.resume("one").expect(200);
    assert_eq!(hash(api, "one", "/run/again"), again);
    work.check(api, "one");

    let full = wait_for("all is loaded", PATIENCE, || {
        Some(ram_mb(place, "one")).filter(|mb| *mb >= stored - OTHERS_MB)
    });
    api.shell("one", "rm /run/again");
    // What is given back waits for an engine to hear of it.
    kill_engine(place);
    shrinks_to(place, "one", full - GONE_MB);
    kill_engine(place);
    work.check(api, "one");
    let paused = api.pause("one").expect(200);
    let freed = stored_mb(place, &paused);
    assert!(freed < stored - GONE_MB / 2, "{freed} after {stored}");
    api.resume("one").expect(200);
    work.check(api, "one");
}
