//! The command line against a daemon with a real guest.

mod support;

use std::process::{Command, Output, Stdio};

use serde_json::Value;
use support::daemon::Daemon;
use support::place::Place;
use support::{needs, skip};

struct Thaw<'a>(&'a Place);

impl Thaw<'_> {
    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(needs::thaw());
        command.args(args).env("THAW_SOCKET", self.0.socket());
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// Standard output of a command that has to succeed.
    #[track_caller]
    fn good(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let text = self.good(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"))
    }

    /// Standard error of a command that has to fail.
    #[track_caller]
    fn bad(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

#[test]
fn guest_is_handled_from_the_command_line() {
    let test = "guest_is_handled_from_the_command_line";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(test, &reason),
    };
    let _turn = needs::one_at_a_time();
    let place = Place::new("tcli", 48, Some(&inputs));
    let thaw = Thaw(&place);
    assert!(thaw.bad(&["ls"]).contains("is it running?"));
    let daemon = Daemon::start(&place);

    let create = [
        "create",
        "base",
        "--id",
        "one",
        "-e",
        "COLOUR=blue",
        "-l",
        "owner=me",
        "--disk-mib-per-s",
        "512",
    ];
    assert_eq!(thaw.good(&create), "one\n");
    assert_eq!(thaw.good(&create), "one\n", "the same again is the same");
    let listed = thaw.good(&["ls", "--label", "owner=me"]);
    let words: Vec<&str> = listed.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(words[..3], ["one", "running", "base"], "{listed}");
    let one = thaw.json(&["ls", "--label", "owner=me"]);
    let limits = serde_json::json!({ "mib_per_s": 512 });
    assert_eq!(one[0]["disk_limits"], limits, "{one}");
    assert_eq!(
        thaw.json(&["ls", "--state", "paused"]),
        serde_json::json!([])
    );

    // Its output is ours, and its exit status.
    let script = "echo $COLOUR; echo err >&2; exit 7";
    let ran = thaw.run(&["exec", "one", "sh", "-c", script]);
    assert_eq!(ran.status.code(), Some(7));
    assert_eq!(
        (&*ran.stdout, &*ran.stderr),
        (&b"blue\n"[..], &b"err\n"[..])
    );
    let ran = thaw.run(&["exec", "--json", "-u", "root", "one", "id", "-u"]);
    let ran: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!(ran["stdout"], "0\n");
    assert!(
        thaw.bad(&["exec", "one", "no-such-program"])
            .contains("no-such-program")
    );
    assert!(thaw.bad(&["shell", "one"]).contains("no terminal"));

    assert_eq!(thaw.json(&["pause", "one"])["state"], "paused");
    assert!(thaw.bad(&["pause", "one"]).contains("paused already"));
    assert!(thaw.bad(&["exec", "one", "true"]).contains("paused"));
    assert_eq!(thaw.good(&["resume", "one", "--timeout-s", "600"]), "one\n");
    let top = thaw.json(&["top"]);
    assert_eq!(top[0]["id"], "one", "{top}");
    assert!(
        top[0]["resident_pages"].as_u64() < top[0]["guest_pages"].as_u64(),
        "{top}"
    );
    assert!(thaw.good(&["top"]).contains("FAULTS/S"));

    let fork = thaw.good(&["fork", "one"]);
    assert_eq!(
        thaw.good(&["exec", fork.trim(), "sh", "-c", "echo $COLOUR"]),
        "blue\n"
    );
    assert_eq!(
        thaw.good(&["snapshot", "create", "one", "--name", "tpl"]),
        "tpl\n"
    );
    assert!(thaw.good(&["snapshot", "ls"]).contains("memory"));
    thaw.good(&["snapshot", "rm", "tpl"]);
    assert!(thaw.bad(&["snapshot", "rm", "tpl"]).contains("tpl"));
    thaw.good(&["rm", fork.trim()]);

    assert_eq!(thaw.json(&["host"])["status"], "ready");
    assert!(thaw.good(&["host"]).contains("1 running"));
    assert_eq!(thaw.json(&["drain"])["paused"], serde_json::json!(["one"]));
    assert!(thaw.bad(&["resume", "one"]).contains("draining"));
    thaw.good(&["drain", "--undo"]);
    // The stream has no end: what was said before it is cut is enough.
    let mut events = Command::new("timeout");
    let events = events
        .arg("5")
        .arg(needs::thaw())
        .args(["events", "--after", "0"]);
    let events = events.env("THAW_SOCKET", place.socket()).output().unwrap();
    let events = String::from_utf8(events.stdout).unwrap();
    assert!(
        events.contains("one") && events.contains("resuming"),
        "{events}"
    );
    thaw.good(&["rm", "one"]);
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}

#[test]
fn the_program_documents_itself() {
    let place = Place::new("tabout", 49, None);
    let thaw = Thaw(&place);
    for shell in ["bash", "zsh", "fish"] {
        let text = thaw.good(&["completions", shell]);
        assert!(
            text.contains("snapshot") && text.contains("drain"),
            "{shell}"
        );
    }
    let dir = place.root.join("man");
    thaw.good(&["man", dir.to_str().unwrap()]);
    let page = std::fs::read_to_string(dir.join("thaw-exec.1")).unwrap();
    assert!(page.contains("exit status"), "{page}");
    let committed = concat!(env!("CARGO_MANIFEST_DIR"), "/../http-api/openapi.json");
    let committed = std::fs::read_to_string(committed).unwrap();
    assert!(thaw.good(&["openapi"]) == committed);
}
