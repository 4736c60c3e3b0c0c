//! What only the host asks for: freezing, preloading, ports; and how little an idle daemon needs.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use envd::protocol::{Output, ProcessEvent, is_host_only};
use serde_json::Value;

use crate::client::{Daemon, start};

/// A directory of the cgroup v2 hierarchy, removed when dropped.
struct Group(PathBuf);

impl Group {
    fn make() -> Option<Group> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
        let line = mounts
            .lines()
            .find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
        let root = Path::new(line.split(' ').nth(1)?);
        let path = root.join(format!("envd-test-{}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        path.join("cgroup.procs").exists().then_some(Group(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..100 {
            let _ = std::fs::write(self.0.join("sandbox/cgroup.kill"), "1");
            let _ = std::fs::remove_dir(self.0.join("sandbox"));
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn frozen_processes_stand_still_until_they_are_thawed() {
    let test = "frozen_processes_stand_still_until_they_are_thawed";
    let Some(group) = Group::make() else {
        return println!("skipped: {test}: needs root and cgroup v2");
    };
    let daemon = Daemon::start_with(&["--control-groups", group.0.to_str().unwrap()]);
    let script = "(while :; do echo x; sleep 0.01; done) & wait";
    let mut events = daemon.open("Start", &[], &start(script));
    let pid = events.pid();
    let post = |path: &str| daemon.call("POST", path, &[], "").status;
    let is_frozen = || {
        let events = group.0.join("sandbox/cgroup.events");
        std::fs::read_to_string(events)
            .unwrap()
            .contains("frozen 1")
    };
    assert!(matches!(
        events.next(),
        Ok(ProcessEvent::Data(Output::Stdout(_)))
    ));
    assert_eq!(post("/snapshot/freeze"), 204);
    assert!(is_frozen());
    assert_eq!(post("/snapshot/freeze"), 204, "again");
    assert_eq!(
        daemon.call("GET", "/health", &[], "").status,
        200,
        "the daemon goes on"
    );
    assert_eq!(post("/snapshot/thaw"), 204);
    assert!(!is_frozen());
    assert_eq!(post("/snapshot/thaw"), 204, "again");

    // It ends by itself, and an earlier one's timer doesn't end a later one.
    assert_eq!(post("/snapshot/freeze?timeout_ms=150"), 204);
    assert_eq!(post("/snapshot/freeze?timeout_ms=600"), 204);
    std::thread::sleep(Duration::from_millis(300));
    assert!(is_frozen());
    std::thread::sleep(Duration::from_millis(600));
    assert!(!is_frozen());
    assert_eq!(post("/snapshot/freeze?timeout_ms=0"), 400);
    let kill = format!(r#"{{"process":{{"pid":{pid}}},"signal":"SIGNAL_SIGKILL"}}"#);
    assert_eq!(daemon.unary("SendSignal", &kill).status, 200);
    assert_eq!(events.collect().end.unwrap().status, "signal: killed");
}

#[test]
fn machine_that_cannot_freeze_says_so() {
    let daemon = Daemon::start();
    assert_eq!(daemon.call("POST", "/snapshot/freeze", &[], "").status, 501);
    assert_eq!(daemon.call("POST", "/snapshot/thaw", &[], "").status, 204);
}

#[test]
fn memory_is_preloaded_until_it_is_cancelled() {
    let daemon = Daemon::start();
    let status = || -> Value {
        let answer = daemon.call("GET", "/memory/preload", &[], "");
        serde_json::from_str(&answer.body).unwrap()
    };
    assert_eq!(status()["state"], "idle");
    assert_eq!(daemon.call("POST", "/memory/preload", &[], "").status, 202);
    let give_up = Instant::now() + Duration::from_secs(20);
    while status()["state"] == "running" && status()["pages"].as_u64() < Some(1000) {
        assert!(Instant::now() < give_up, "{}", status());
        std::thread::sleep(Duration::from_millis(5));
    }
    if status()["state"] == "failed" {
        let reason = status()["error"].clone();
        return println!("skipped: memory_is_preloaded_until_it_is_cancelled: {reason}");
    }
    assert_eq!(
        daemon.call("DELETE", "/memory/preload", &[], "").status,
        204
    );
    while status()["state"] == "running" {
        assert!(Instant::now() < give_up);
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = status();
    assert!(ended["bytes"].as_u64() >= Some(4_096_000), "{ended}");
    assert!(
        ended["bytes"].as_u64() <= ended["totalBytes"].as_u64(),
        "{ended}"
    );
    println!("{ended}");
}

#[test]
fn ports_are_told_as_they_open_and_close() {
    let daemon = Daemon::start();
    let stream = daemon.send("GET", "/ports/events", &[], b"");
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    let mut next = || -> Vec<(u64, bool)> {
        let line = lines.find(|line| line.starts_with('{')).unwrap();
        let all: Value = serde_json::from_str(&line).unwrap();
        let ports = all["ports"].as_array().unwrap().iter();
        ports
            .map(|p| {
                (
                    p["port"].as_u64().unwrap(),
                    p["loopback"].as_bool().unwrap(),
                )
            })
            .collect()
    };
    let before = next();
    let own: u64 = daemon
        .address()
        .rsplit(':')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        before.iter().all(|(port, _)| *port != own),
        "not the daemon's own"
    );
    let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
    let here = TcpListener::bind("[::1]:0").unwrap();
    let port = |listener: &TcpListener| u64::from(listener.local_addr().unwrap().port());
    let opened = [(port(&everywhere), false), (port(&here), true)];
    let mut seen = Vec::new();
    // Other tests open and close ports meanwhile.
    while !opened.iter().all(|port| seen.contains(port)) {
        seen = next();
    }
    let answer: Value = serde_json::from_str(&daemon.call("GET", "/ports", &[], "").body).unwrap();
    assert!(
        answer["ports"]
            .as_array()
            .unwrap()
            .iter()
            .any(|p| p["port"] == opened[0].0)
    );
    drop(everywhere);
    while seen.contains(&opened[0]) {
        seen = next();
    }
}

#[test]
fn idle_daemon_is_small_and_still() {
    let daemon = Daemon::start();
    assert_eq!(daemon.run("true", &[]).end.unwrap().exit_code, 0);
    std::thread::sleep(Duration::from_millis(300));
    let proc =
        |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", daemon.pid())).unwrap();
    let wakes = || -> u64 {
        let status = proc("status");
        let counts = status
            .lines()
            .filter_map(|line| line.split_once("ctxt_switches:"));
        counts
            .map(|(_, count)| count.trim().parse::<u64>().unwrap())
            .sum()
    };
    let before = wakes();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(wakes(), before, "an idle daemon never wakes");
    assert_eq!(
        proc("status")
            .lines()
            .find(|l| l.starts_with("Threads:"))
            .unwrap(),
        "Threads:\t1"
    );
}

#[test]
fn everything_beyond_the_clients_routes_is_for_the_host_only() {
    for path in [
        "/init",
        "/snapshot/prepare",
        "/snapshot/freeze",
        "/snapshot/thaw",
    ] {
        assert!(is_host_only(path), "{path}");
    }
    for path in ["/memory/preload", "/ports", "/ports/events"] {
        assert!(is_host_only(path), "{path}");
    }
    for path in [
        "/files",
        "/files/compose",
        "/metrics",
        "/envs",
        "/process.Process/List",
    ] {
        assert!(!is_host_only(path), "{path}");
    }
}
