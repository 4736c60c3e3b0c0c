//! A tiny run of restores of a real guest. Nothing is said about times.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

const QEMU: &str = "qemu-system-x86_64";

/// Inputs and preload library; otherwise what is missing.
fn surroundings() -> Result<(PathBuf, PathBuf), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("network namespaces and VMMs need root".into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    if !env::split_paths(&path).any(|dir| dir.join(QEMU).is_file()) {
        return Err(format!("no {QEMU}"));
    }
    let of = |variable: &str| {
        let path = env::var_os(variable).map(PathBuf::from);
        let path = path.filter(|path| path.exists());
        path.ok_or_else(|| format!("{variable} names nothing; `cargo verify` sets it"))
    };
    Ok((of("THAW_INPUTS")?, of("THAW_PRELOAD")?))
}

fn names(list: &Value) -> Vec<&str> {
    let items = list.as_array().unwrap().iter();
    items.map(|item| item["name"].as_str().unwrap()).collect()
}

#[test]
fn guest_restores_are_measured_until_envd_answers() {
    let (inputs, preload) = match surroundings() {
        Ok(found) => found,
        Err(reason) => {
            let test = "guest_restores_are_measured_until_envd_answers";
            return println!("skipped: {test}: {reason}");
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args([
            "restore",
            "--qemu",
            QEMU,
            "--rounds",
            "1",
            "--restores",
            "2",
        ])
        .arg("--inputs")
        .arg(inputs)
        .arg("--preload")
        .arg(preload)
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let parts = ["until it runs", "our own part", "until envd answers"];
    assert_eq!(names(&report["parts"]), parts);
    let [running, own, answered] = [0, 1, 2].map(|part| &report["parts"][part]["subjects"]);
    // It has no processes that wait.
    assert_eq!(names(running), ["driver", "bare script"]);
    assert_eq!(names(own), ["p50", "p99"]);
    let first = |part: &Value| part[0]["by_round"][0].as_f64().unwrap();
    assert!(
        first(own) < first(running) && first(running) < first(answered),
        "{report:#}"
    );
}
