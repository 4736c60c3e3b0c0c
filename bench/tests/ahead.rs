//! Tiny runs of populate, replay and sessions, and of page-fault with another handler, an
//! evicted source and other orders. Nothing is said about times.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};

/// Whether this machine has userfaultfd for us; otherwise the test is skipped.
fn has_uffd(test: &str) -> bool {
    match Uffd::create(FEATURE_EVENT_REMOVE) {
        Ok(_) => true,
        Err(error) => {
            println!("skipped: {test}: no userfaultfd: {error}");
            false
        }
    }
}

/// Runs one bench and returns its report; `Err` with what it said when it failed.
fn run(dir: &Path, args: &[&str]) -> Result<Value, String> {
    let json = dir.join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(args)
        .args(["--rounds", "1", "--seed", "3", "--dir"])
        .arg(dir)
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    if !output.status.success() {
        return Err(String::from_utf8(output.stderr).unwrap());
    }
    Ok(serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap())
}

fn names(list: &Value) -> Vec<&str> {
    let items = list.as_array().unwrap().iter();
    items.map(|item| item["name"].as_str().unwrap()).collect()
}

#[test]
fn loading_replaying_and_many_sessions_are_measured_beside_their_baselines() {
    if !has_uffd("loading_replaying_and_many_sessions_are_measured_beside_their_baselines") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let populate = run(dir.path(), &["populate", "--mib", "2"]).unwrap();
    assert_eq!(names(&populate["parts"]), ["populate", "populate shared"]);
    let subjects = names(&populate["parts"][0]["subjects"]);
    assert_eq!(subjects.len(), 8, "{subjects:?}");
    let shared = names(&populate["parts"][1]["subjects"]);
    assert_eq!(shared.len(), 4, "{shared:?}");

    let replay = run(dir.path(), &["replay", "--mib", "4"]).unwrap();
    let subjects = names(&replay["parts"][0]["subjects"]);
    assert_eq!(
        subjects,
        [
            "resident + bare copy",
            "no replay",
            "right set",
            "wrong set"
        ]
    );
    assert_eq!(replay["parts"][0]["goals"].as_array().unwrap().len(), 2);

    let sessions = run(dir.path(), &["sessions", "--mib", "1", "--idle", "20"]).unwrap();
    assert_eq!(
        names(&sessions["parts"]),
        ["fault", "cpu", "memory", "idle", "death"]
    );
    for part in sessions["parts"].as_array().unwrap() {
        assert!(!part["goals"].as_array().unwrap().is_empty(), "{part}");
    }
}

#[test]
fn another_handler_is_measured_and_its_content_checked() {
    if !has_uffd("another_handler_is_measured_and_its_content_checked") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let peer = |name: &str, source: &str| {
        let path = dir.path().join(name);
        let bench = env!("CARGO_BIN_EXE_bench");
        let cpu = nix::sched::sched_getcpu().unwrap();
        let script = format!("#!/bin/sh\nexec {bench} floor --cpu {cpu} --socket $1 {source}\n");
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        format!("{name}={}", path.display())
    };
    let good = peer("good", "--source $2");
    let args = ["page-fault", "--faults", "64", "--peer", &good];
    let report = run(dir.path(), &args).unwrap();
    let subjects = report["subjects"].as_array().unwrap();
    let found = subjects.iter().find(|s| s["name"] == "good").unwrap();
    assert_eq!(found["fault_us"]["count"], 64);
    assert!(found["rounds"][0]["faults"].is_null(), "it doesn't say");

    // One that serves the same hot page everywhere.
    let wrong = peer("wrong", "");
    let args = ["page-fault", "--faults", "64", "--peer", &wrong];
    assert!(
        run(dir.path(), &args)
            .unwrap_err()
            .contains("Wrong content")
    );
    let missing = ["page-fault", "--faults", "64", "--peer", "x=/nonexistent"];
    assert!(run(dir.path(), &missing).unwrap_err().contains("Starting"));
}

#[test]
fn other_orders_and_a_cold_source_are_served_as_well() {
    if !has_uffd("other_orders_and_a_cold_source_are_served_as_well") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for order in ["sequential", "runs"] {
        let args = ["page-fault", "--faults", "64", "--order", order];
        let report = run(dir.path(), &args).unwrap();
        assert_eq!(report["setup"]["order"], order);
    }
    match run(dir.path(), &["page-fault", "--faults", "256", "--evicted"]) {
        Ok(report) => {
            let ours = &report["subjects"][1];
            assert_eq!(ours["name"], "ours");
            assert!(
                ours["rounds"][0]["pages_from_disk"].as_u64() > Some(0),
                "{ours}"
            );
            assert_eq!(report["ratios"][0]["baseline"], "floor-disk");
        }
        Err(said) => {
            assert!(said.contains("keeps its pages"), "{said}");
            println!(
                "skipped: other_orders_and_a_cold_source_are_served_as_well: no eviction here"
            );
        }
    }
}
