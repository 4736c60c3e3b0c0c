//! What the kernel says of a guest's VMM: who it is, what it may do, and what it may take.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::place::Place;
use crate::support::procs::{self, Process};

/// Set where control groups have to be there.
pub(crate) const GROUPS: &str = "THAW_TEST_CGROUPS";

const FIRST_USER: u32 = 300_000;
/// Of the place's pool, two addresses each.
const SLOTS: u32 = 128;
const OVERHEAD_MB: u64 = 640;
const CPU_MAX_PERCENT: u64 = 150;
const PIDS_MAX: u64 = 400;

/// Configures a place so that what is asked for is not the default.
pub(crate) fn configure(place: &Place) {
    let lines = format!(
        "[vmm]\njail_user = {FIRST_USER}\nmemory_overhead_mb = {OVERHEAD_MB}\n\
         cpu_max_percent = {CPU_MAX_PERCENT}\npids_max = {PIDS_MAX}\n"
    );
    place.reconfigure(&[("[vmm]\n", &lines)]);
}

/// The VMM of this sandbox, which has one processor, is confined as `host` says and as the place is
/// configured.
#[track_caller]
pub(crate) fn check(place: &Place, host: &Value, id: &str) {
    let vmm = procs::vmm(place, id).expect("a VMM");
    if host["vmm"]["name"] != "firecracker" {
        has_no_privilege(&vmm, host);
    }
    let missing = ["memory", "cpu", "pids"].iter().any(|name| {
        let here = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
        !here
            .unwrap_or_default()
            .split_whitespace()
            .any(|word| word == *name)
    });
    if missing {
        assert!(std::env::var_os(GROUPS).is_none(), "no control groups");
        println!("the limits of {id}'s VMM are not looked at: no control groups (version 2) here");
        return;
    }
    is_limited(&vmm, id, &place.instance);
}

fn has_no_privilege(vmm: &Process, host: &Value) {
    let reason = host["vmm"]["reason"].as_str().unwrap();
    let said = format!("as a user of its own per slot, from {FIRST_USER} on");
    assert!(reason.contains(&said), "{reason}");
    for name in ["Uid:", "Gid:"] {
        let ids: Vec<u32> = vmm
            .status(name)
            .iter()
            .map(|id| id.parse().unwrap())
            .collect();
        let slots = FIRST_USER..FIRST_USER + SLOTS;
        // Real, effective, saved, and of the file system.
        assert!(ids.len() == 4 && slots.contains(&ids[0]), "{name} {ids:?}");
        assert!(ids.iter().all(|id| *id == ids[0]), "{name} {ids:?}");
    }
    for name in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(vmm.status(name), ["0000000000000000"], "{name}");
    }
    assert_eq!(vmm.status("NoNewPrivs:"), ["1"]);
    assert_eq!(vmm.status("Groups:"), Vec::<String>::new());
    // A filter.
    assert_eq!(vmm.status("Seccomp:"), ["2"]);
}

fn is_limited(vmm: &Process, id: &str, instance: &str) {
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", vmm.pid)).unwrap();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"));
    let group = group.unwrap();
    assert!(group.ends_with(&format!("{instance}/{id}")), "{group}");
    let dir: PathBuf = Path::new("/sys/fs/cgroup").join(group.trim_start_matches('/'));
    let said = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
    // The guest's, its VMM's own, and a 64th for the kernel's tables.
    let memory = (256 + OVERHEAD_MB + 256 / 64) << 20;
    assert_eq!(said("memory.max").trim(), memory.to_string());
    let cpu = format!("{} 100000", CPU_MAX_PERCENT * 1000);
    assert_eq!(said("cpu.max").trim(), cpu);
    assert_eq!(said("pids.max").trim(), (PIDS_MAX + 1).to_string());
    // And they count this one.
    let processes = said("cgroup.procs");
    let pid = vmm.pid.to_string();
    assert!(processes.lines().any(|line| line == pid), "{processes}");
    let number = |name: &str| said(name).trim().parse::<u64>().unwrap();
    assert!(number("memory.current") > 0 && number("pids.current") > 0);
}
