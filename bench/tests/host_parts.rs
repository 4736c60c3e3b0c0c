//! Tiny runs of slots and disks. Nothing is said about times.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn run(dir: &Path, args: &[&str]) -> Value {
    let json = dir.join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(args)
        .args(["--rounds", "1", "--json"])
        .arg(&json)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap()
}

fn names(list: &Value) -> Vec<&str> {
    let items = list.as_array().unwrap().iter();
    items.map(|item| item["name"].as_str().unwrap()).collect()
}

#[test]
fn slots_are_measured_beside_a_bare_loop_and_leave_nothing() {
    if !nix::unistd::geteuid().is_root() {
        let test = "slots_are_measured_beside_a_bare_loop_and_leave_nothing";
        return println!("skipped: {test}: network namespaces need root");
    }
    let dir = tempfile::tempdir().unwrap();
    let report = run(dir.path(), &["slots", "--slots", "10"]);
    assert_eq!(names(&report["parts"]), ["acquire", "build"]);
    assert_eq!(
        names(&report["parts"][1]["subjects"]),
        ["bare loop", "slots"]
    );
    for part in report["parts"].as_array().unwrap() {
        assert_eq!(part["goals"].as_array().unwrap().len(), 1, "{part}");
    }
    let left = std::fs::read_dir("/run/netns").unwrap().flatten();
    let left: Vec<_> = left
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| name.starts_with("bslot"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn disks_are_measured_and_what_is_not_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().unwrap().to_owned();
    let small = ["--image-mib", "512", "--data-mib", "8", "--seed", "3"];
    let report = run(
        dir.path(),
        &[&["disks", "--dir", &place], &small[..]].concat(),
    );
    let measured = names(&report["parts"]);
    let skipped = report["setup"]["skipped"].as_array().unwrap().len();
    assert_eq!(measured.len() + skipped, 3, "{report}");
    assert_eq!(*measured.last().unwrap(), "flatten");
    for part in report["parts"].as_array().unwrap() {
        assert_eq!(part["goals"].as_array().unwrap().len(), 1, "{part}");
    }
}
