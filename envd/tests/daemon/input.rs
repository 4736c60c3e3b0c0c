//! Terminals, streamed input, and several readers of one process.

use std::time::{Duration, Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use envd::protocol::{Output, ProcessEvent};
use serde_json::{Value, json};

use crate::client::{Daemon, Json, start};

fn terminal(daemon: &Daemon, script: &str) -> (Json, u64) {
    let request = json!({
        "process": {"cmd": "/bin/sh", "args": ["-c", script]},
        "pty": {"size": {"cols": 91, "rows": 17}},
    });
    let mut events = daemon.open_json("/process.Process/Start", &[], &request);
    let started = events.next().unwrap();
    let pid = started["event"]["start"]["pid"].as_u64().unwrap();
    (events, pid)
}

/// What the terminal prints until it has printed `needle`, or the process has ended.
fn printed(events: &mut Json, needle: &str) -> String {
    let mut text = String::new();
    while !text.contains(needle) {
        let Ok(message) = events.next() else { break };
        if let Some(bytes) = message["event"]["data"]["pty"].as_str() {
            text.push_str(&String::from_utf8_lossy(&STANDARD.decode(bytes).unwrap()));
        }
    }
    text
}

fn typed(pid: u64, bytes: &[u8]) -> String {
    json!({"process": {"pid": pid}, "input": {"pty": STANDARD.encode(bytes)}}).to_string()
}

#[test]
fn terminal_controls_its_session_and_can_be_resized() {
    let daemon = Daemon::start();
    let script = "stty size; tty; ps -o tty= -p $$; echo ready; \
                  read line; stty size; echo got:$line; read line || echo end";
    let (mut events, pid) = terminal(&daemon, script);
    let text = printed(&mut events, "ready");
    assert!(
        text.contains("17 91") && text.contains("/dev/pts/"),
        "{text}"
    );
    assert_eq!(
        text.matches("pts/").count(),
        2,
        "it controls the session: {text}"
    );

    let resize = json!({"process": {"pid": pid}, "pty": {"size": {"cols": 120, "rows": 40}}});
    assert_eq!(daemon.unary("Update", &resize.to_string()).status, 200);
    let none = json!({"process": {"pid": pid}, "pty": {"size": {"cols": 0, "rows": 40}}});
    assert_eq!(daemon.unary("Update", &none.to_string()).status, 400);
    assert_eq!(
        daemon.unary("SendInput", &typed(pid, b"hello\n")).status,
        200
    );
    let text = printed(&mut events, "got:hello");
    assert!(text.contains("40 120"), "it has the new size: {text}");

    // A terminal has no standard input to be written or closed.
    let stdin = json!({"process": {"pid": pid}, "input": {"stdin": "eA=="}}).to_string();
    assert_eq!(daemon.unary("SendInput", &stdin).status, 400);
    let close = json!({"process": {"pid": pid}}).to_string();
    assert_eq!(daemon.unary("CloseStdin", &close).status, 400);
    // Its end-of-file is a byte.
    assert_eq!(daemon.unary("SendInput", &typed(pid, b"\x04")).status, 200);
    assert!(printed(&mut events, "end").contains("end"));
    let mut end = Value::Null;
    while let Ok(message) = events.next() {
        end = message["event"]["end"].clone();
    }
    assert_eq!(end["exited"], true);
}

#[test]
fn interrupt_typed_at_a_terminal_reaches_its_foreground() {
    let daemon = Daemon::start();
    let (mut events, pid) = terminal(&daemon, "echo ready; exec sleep 100");
    printed(&mut events, "ready");
    assert_eq!(daemon.unary("SendInput", &typed(pid, b"\x03")).status, 200);
    let mut end = Value::Null;
    while let Ok(message) = events.next() {
        if message["event"]["end"].is_object() {
            end = message["event"]["end"].clone();
        }
    }
    assert_eq!(end["status"], "signal: interrupt", "{end}");
}

#[test]
fn terminal_of_a_killed_process_ends_its_stream() {
    let daemon = Daemon::start();
    let (mut events, pid) = terminal(&daemon, "echo ready; sleep 100");
    printed(&mut events, "ready");
    let kill = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"}).to_string();
    assert_eq!(daemon.unary("SendSignal", &kill).status, 200);
    let asked = Instant::now();
    let mut statuses = Vec::new();
    while let Ok(message) = events.next() {
        statuses.push(message["event"]["end"]["status"].clone());
    }
    assert_eq!(statuses.last().unwrap(), "signal: killed");
    assert!(asked.elapsed() < Duration::from_secs(5));
}

#[test]
fn input_is_streamed_in_order() {
    let daemon = Daemon::start();
    let request = json!({"process": {"cmd": "cat"}, "tag": "cat"}).to_string();
    let mut events = daemon.open("Start", &[], &request);
    let pid = events.pid();
    let mut messages = vec![
        json!({"start": {"process": {"pid": pid}}}),
        json!({"keepalive": {}}),
    ];
    let mut expected = Vec::new();
    for part in 0..200 {
        let bytes = vec![b'a' + (part % 26) as u8; 1000 + part];
        messages.push(json!({"data": {"input": {"stdin": STANDARD.encode(&bytes)}}}));
        expected.extend(bytes);
    }
    let reader = std::thread::spawn(move || events.collect());
    let (_, end) = daemon.send_stream("StreamInput", &messages);
    assert_eq!(end.error, None);
    assert_eq!(
        daemon
            .unary("CloseStdin", r#"{"process":{"tag":"cat"}}"#)
            .status,
        200
    );
    assert_eq!(reader.join().unwrap().stdout, expected);

    let code = |messages: &[Value]| {
        let (_, end) = daemon.send_stream("StreamInput", messages);
        end.error.unwrap().code
    };
    let gone = json!({"start": {"process": {"pid": pid}}});
    assert_eq!(code(&[gone]), "not_found");
    let data = json!({"data": {"input": {"stdin": "eA=="}}});
    assert_eq!(code(&[data]), "invalid_argument", "data before the start");
    assert_eq!(code(&[]), "invalid_argument");
}

#[test]
fn input_that_is_not_read_ends_at_the_callers_deadline() {
    let daemon = Daemon::start();
    let request = r#"{"process":{"cmd":"sleep","args":["100"]},"tag":"deaf"}"#;
    daemon.open("Start", &[], request).pid();
    let input = json!({
        "process": {"tag": "deaf"},
        "input": {"stdin": STANDARD.encode(vec![0; 1 << 20])},
    });
    let headers = [
        ("content-type", "application/json"),
        ("connect-timeout-ms", "300"),
    ];
    let answer = daemon.call(
        "POST",
        "/process.Process/SendInput",
        &headers,
        &input.to_string(),
    );
    assert!(answer.body.contains("deadline_exceeded"), "{}", answer.body);
    let kill = r#"{"process":{"tag":"deaf"},"signal":"SIGNAL_SIGKILL"}"#;
    assert_eq!(daemon.unary("SendSignal", kill).status, 200);
}

#[test]
fn every_reader_hears_everything_however_slow_one_is() {
    let daemon = Daemon::start();
    let script = "read go; i=0; while [ $i -lt 2000 ]; do printf '%01000d' $i; i=$((i+1)); done";
    let mut request: Value = serde_json::from_str(&start(script)).unwrap();
    request["tag"] = "many".into();
    request["stdin"] = true.into();
    let mut first = daemon.open("Start", &[], &request.to_string());
    first.pid();
    let mut others: Vec<_> = (0..3)
        .map(|_| daemon.open("Connect", &[], r#"{"process":{"tag":"many"}}"#))
        .collect();
    for other in &mut others {
        other.pid();
    }
    let go = r#"{"process":{"tag":"many"},"input":{"stdin":"Z28K"}}"#;
    assert_eq!(daemon.unary("SendInput", go).status, 200);
    let readers: Vec<_> = others
        .into_iter()
        .enumerate()
        .map(|(reader, events)| {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(200 * reader as u64));
                events.collect()
            })
        })
        .collect();
    let whole = first.collect();
    assert_eq!(whole.stdout.len(), 2_000_000);
    for reader in readers {
        let outcome = reader.join().unwrap();
        assert_eq!(outcome.stdout, whole.stdout);
        assert_eq!(outcome.end, whole.end);
    }
}

#[test]
fn two_hundred_commands_at_once_all_end() {
    let daemon = Daemon::start();
    let mut streams: Vec<_> = (0..200)
        .map(|number| daemon.open("Start", &[], &start(&format!("sleep 0.5; echo {number}"))))
        .collect();
    for stream in &mut streams {
        stream.pid();
    }
    for (number, stream) in streams.into_iter().enumerate() {
        let outcome = stream.collect();
        assert_eq!(outcome.stdout, format!("{number}\n").into_bytes());
        assert_eq!(outcome.end.unwrap().exit_code, 0);
    }
    let limit = daemon.run("ulimit -Sn", &[]).stdout;
    let ours = std::process::Command::new("sh")
        .args(["-c", "ulimit -Sn"])
        .output()
        .unwrap();
    assert_eq!(
        limit, ours.stdout,
        "a process has the limit that the daemon got"
    );
}

#[test]
fn output_before_a_signal_is_told_before_the_end() {
    let daemon = Daemon::start();
    let mut events = daemon.open("Start", &[], &start("echo last; kill -SEGV $$"));
    events.pid();
    assert_eq!(
        events.next().unwrap(),
        ProcessEvent::Data(Output::Stdout(b"last\n".to_vec()))
    );
    let end = events.collect().end.unwrap();
    assert!(
        end.status.starts_with("signal: segmentation fault"),
        "{end:?}"
    );
    assert!(!end.exited);
}
