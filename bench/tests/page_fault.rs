//! A tiny run of the bench, end to end: every process starts, every page is served and checked,
//! and the report has what reports must have. Nothing is said about times.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

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

fn bench(args: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(args)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.success(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn a_tiny_run_reports_every_subject_and_its_ratio_to_the_floor() {
    if !has_uffd("a_tiny_run_reports_every_subject_and_its_ratio_to_the_floor") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("report.json");
    let (json_arg, dir_arg) = (json.to_str().unwrap(), dir.path().to_str().unwrap());
    let (done, printed, said) = bench(&[
        "page-fault",
        "--faults",
        "256",
        "--rounds",
        "1",
        "--seed",
        "7",
        "--explain",
        "--json",
        json_arg,
        "--dir",
        dir_arg,
    ]);
    assert!(done, "{printed}\n{said}");
    assert!(printed.contains("ours/floor-"), "{printed}");
    assert!(printed.contains("seed 7"), "{printed}");
    assert!(printed.contains("this is no measurement"), "{printed}");

    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    for field in ["cpu", "kernel", "filesystem", "clock_source"] {
        assert!(report["host"][field].is_string(), "{field} in {report}");
    }
    let setup = &report["setup"];
    assert_eq!(setup["loop"], "closed loop, one outstanding fault");
    assert_eq!(setup["seed"], 7);
    assert_eq!(setup["rounds"], 1);
    assert_eq!(setup["touches_per_round"], 256);
    assert_eq!(setup["page_bytes"], 4096);
    assert_eq!(setup["cpus"]["faulter"], setup["cpus"]["worker"]);

    let subjects = report["subjects"].as_array().unwrap();
    let names: Vec<_> = subjects
        .iter()
        .map(|s| s["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names[..4],
        ["floor-poll", "floor-block", "floor-busy", "floor-ring"]
    );
    assert_eq!(names[names.len() - 2..], ["ours", "ours-window-16"]);
    for subject in subjects {
        let round = &subject["rounds"][0];
        assert!(round["pass_us_per_page"].is_f64(), "{subject}");
        if subject["window_pages"] == 1 {
            assert!(round["faults"].as_u64() >= Some(256), "{subject}");
            assert_eq!(subject["fault_us"]["count"], 256);
            for percentile in ["p50", "p90", "p99", "p99_9", "max"] {
                assert!(subject["fault_us"][percentile].is_f64(), "{subject}");
            }
        } else {
            let faults = round["faults"].as_u64().unwrap();
            assert!((16..256).contains(&faults), "{subject}");
            assert!(subject["fault_us"].is_null());
        }
    }
    let ratios = report["ratios"].as_array().unwrap();
    assert_eq!(ratios.len(), subjects.len() - 1);
    let ours = ratios
        .iter()
        .find(|ratio| ratio["subject"] == "ours")
        .unwrap();
    assert!(ours["baseline"].as_str().unwrap().starts_with("floor-"));
    assert_eq!(ours["p50"]["by_round"].as_array().unwrap().len(), 1);
    assert!(ours["p50"]["median"].is_f64());
}

#[test]
fn unusable_options_are_refused_before_anything_is_measured() {
    for args in [
        ["page-fault", "--faults", "0"],
        ["page-fault", "--faults", "65537"],
        ["page-fault", "--rounds", "0"],
    ] {
        let (done, printed, said) = bench(&args);
        assert!(!done && printed.is_empty(), "{args:?}: {printed}");
        assert!(said.contains(args[1]), "{args:?}: {said}");
    }
}

#[test]
fn a_subject_that_serves_wrong_pages_is_an_error() {
    if !has_uffd("a_subject_that_serves_wrong_pages_is_an_error") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("floor");
    let start = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_bench"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let cpu = nix::sched::sched_getcpu().unwrap().to_string();
    let mut floor = start(&["floor", "--cpu", &cpu, "--socket", socket.to_str().unwrap()]);
    let mut says = BufReader::new(floor.stdout.take().unwrap()).lines();
    assert_eq!(says.next().unwrap().unwrap(), "\"ready\"");

    // The floor installs one hot page everywhere; a faulter that expects the build's must notice.
    let mut faulter = start(&["faulter", "--cpu", &cpu]);
    let task = serde_json::json!({
        "prepare": {"socket": socket, "pages": 16, "seed": 1, "order": "random", "touches": 16, "words": "of_build"}
    });
    writeln!(faulter.stdin.as_mut().unwrap(), "{task}\n\"go\"").unwrap();
    let output = faulter.wait_with_output().unwrap();
    floor.kill().unwrap();
    floor.wait().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("Wrong content"), "{said}");
}
