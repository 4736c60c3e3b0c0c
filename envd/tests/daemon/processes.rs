//! Processes: start, output, input, signals, ends; and what `/init` and the token change.

use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use envd::protocol::{COMPAT_VERSION, Health, Output, ProcessEvent};

use crate::client::{Daemon, read_response, start};

#[test]
fn health_tells_both_versions() {
    let answer = Daemon::start().call("GET", "/health", &[], "");
    assert_eq!(answer.status, 200);
    let health: Health = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(health.version, COMPAT_VERSION);
    assert_eq!(health.envd, env!("CARGO_PKG_VERSION"));
}

#[test]
fn command_has_its_output_and_its_exit_code() {
    let outcome = Daemon::start().run("echo out; echo err >&2; exit 3", &[]);
    assert!(outcome.pid > 0);
    assert_eq!(outcome.stdout, b"out\n");
    assert_eq!(outcome.stderr, b"err\n");
    let end = outcome.end.unwrap();
    assert_eq!(
        (end.exit_code, end.exited, end.status.as_str()),
        (3, true, "exit status 3")
    );
    assert_eq!(outcome.error, None);
}

#[test]
fn large_output_arrives_whole_through_a_slow_reader() {
    let daemon = Daemon::start();
    let script = "head -c 8000000 /dev/zero | tr '\\0' x; echo done >&2";
    let mut events = daemon.open("Start", &[], &start(script));
    events.pid();
    std::thread::sleep(Duration::from_millis(300));
    let outcome = events.collect();
    assert_eq!(outcome.stdout.len(), 8_000_000);
    assert!(outcome.stdout.iter().all(|byte| *byte == b'x'));
    assert_eq!(outcome.stderr, b"done\n");
    assert_eq!(outcome.end.unwrap().exit_code, 0);
}

#[test]
fn fast_commands_never_lose_their_end() {
    let daemon = Daemon::start();
    for round in 0..100 {
        let outcome = daemon.run("echo x", &[]);
        assert_eq!(outcome.stdout, b"x\n", "round {round}");
        assert!(outcome.end.is_some(), "round {round}");
    }
}

#[test]
fn unknown_command_is_an_error_that_names_it() {
    let daemon = Daemon::start();
    let outcome = daemon
        .open("Start", &[], r#"{"process":{"cmd":"no-such-program"}}"#)
        .collect();
    assert_eq!(outcome.error.as_deref(), Some("not_found"));
    assert_eq!(outcome.pid, 0);
    let missing = daemon.open(
        "Start",
        &[],
        r#"{"process":{"cmd":"true","cwd":"/no/where"}}"#,
    );
    assert_eq!(missing.collect().error.as_deref(), Some("invalid_argument"));
    assert_eq!(
        daemon.open("Start", &[], "{}").collect().error.as_deref(),
        Some("invalid_argument")
    );
}

#[test]
fn signal_reaches_the_whole_process_group() {
    let daemon = Daemon::start();
    let mut events = daemon.open("Start", &[], &start("sleep 100 & echo $!; wait"));
    let pid = events.pid();
    let Ok(ProcessEvent::Data(Output::Stdout(grandchild))) = events.next() else {
        panic!("no pid of the grandchild");
    };
    let grandchild: u32 = String::from_utf8(grandchild)
        .unwrap()
        .trim()
        .parse()
        .unwrap();

    let request = format!(r#"{{"process":{{"pid":{pid}}},"signal":"SIGNAL_SIGKILL"}}"#);
    assert_eq!(daemon.unary("SendSignal", &request).status, 200);
    let end = events.collect().end.unwrap();
    assert_eq!(
        (end.exit_code, end.exited, end.status.as_str()),
        (-1, false, "signal: killed")
    );
    assert!(is_gone(grandchild), "the group's other member");

    let again = daemon.unary("SendSignal", &request);
    assert_eq!(again.status, 404);
    assert!(again.body.contains("not_found"), "{}", again.body);
}

#[test]
fn deadline_kills_the_group_and_says_so() {
    let daemon = Daemon::start();
    let started = Instant::now();
    let outcome = daemon.run("echo early; sleep 100", &[("connect-timeout-ms", "300")]);
    assert!(started.elapsed() < Duration::from_secs(20));
    assert_eq!(outcome.stdout, b"early\n");
    assert_eq!(outcome.end.unwrap().status, "signal: killed");
    assert_eq!(outcome.error.as_deref(), Some("deadline_exceeded"));
    assert!(is_gone(outcome.pid));
}

#[test]
fn disconnect_does_not_kill_and_the_process_can_be_found_again() {
    let daemon = Daemon::start();
    let mut request: serde_json::Value = serde_json::from_str(&start(
        "while :; do head -c 100000 /dev/zero; sleep 0.01; done",
    ))
    .unwrap();
    request["tag"] = "worker".into();
    let pid = daemon.open("Start", &[], &request.to_string()).pid();

    // Much more than a pipe holds, so the process would be stuck if nobody read it.
    std::thread::sleep(Duration::from_millis(500));
    let list = daemon.unary("List", "{}");
    assert!(
        list.body.contains(&format!("\"pid\":{pid}")),
        "{}",
        list.body
    );
    assert!(list.body.contains("\"tag\":\"worker\""), "{}", list.body);

    let taken = daemon.open("Start", &[], &request.to_string()).collect();
    assert_eq!(taken.error.as_deref(), Some("already_exists"));

    let mut again = daemon.open("Connect", &[], r#"{"process":{"tag":"worker"}}"#);
    assert_eq!(again.pid(), pid);
    assert!(
        matches!(again.next(), Ok(ProcessEvent::Data(_))),
        "it still writes"
    );
    let request = r#"{"process":{"tag":"worker"},"signal":"SIGNAL_SIGTERM"}"#;
    assert_eq!(daemon.unary("SendSignal", request).status, 200);
    assert_eq!(again.collect().end.unwrap().status, "signal: terminated");
    assert_eq!(daemon.unary("List", "{}").body, "{}");
}

#[test]
fn standard_input_is_fed_and_closed() {
    let daemon = Daemon::start();
    let mut events = daemon.open(
        "Start",
        &[],
        r#"{"process":{"cmd":"sh","args":["-c","cat; sleep 1"]},"tag":"cat"}"#,
    );
    events.pid();
    let input = r#"{"process":{"tag":"cat"},"input":{"stdin":"aGVsbG8="}}"#;
    assert_eq!(daemon.unary("SendInput", input).status, 200);
    assert_eq!(
        events.next().unwrap(),
        ProcessEvent::Data(Output::Stdout(b"hello".to_vec()))
    );
    assert_eq!(
        daemon
            .unary("CloseStdin", r#"{"process":{"tag":"cat"}}"#)
            .status,
        200
    );
    assert_eq!(daemon.unary("SendInput", input).status, 400);
    assert_eq!(events.collect().end.unwrap().exit_code, 0);
}

#[test]
fn background_child_holds_up_neither_the_end_nor_itself() {
    let daemon = Daemon::start();
    let started = Instant::now();
    let outcome = daemon.run("(sleep 2; echo late; sleep 100) & echo $!", &[]);
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "the end came with the shell's"
    );
    assert_eq!(outcome.end.unwrap().exit_code, 0);
    let child: i32 = String::from_utf8(outcome.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    let child_pid = nix::unistd::Pid::from_raw(child);
    assert!(
        nix::sys::signal::kill(child_pid, None).is_ok(),
        "writing didn't kill it"
    );
    let _ = nix::sys::signal::killpg(
        nix::unistd::getpgid(Some(child_pid)).unwrap(),
        nix::sys::signal::SIGKILL,
    );
}

#[test]
fn keep_alives_come_when_asked_for() {
    let daemon = Daemon::start();
    let outcome = daemon.run("sleep 1.5", &[("keepalive-ping-interval", "1")]);
    assert_eq!(outcome.keep_alives, 1);
    assert_eq!(daemon.run("sleep 1.5", &[]).keep_alives, 0);
}

#[test]
fn environment_comes_from_the_defaults_then_init_then_the_request() {
    let daemon = Daemon::start();
    let init = r#"{"envVars":{"A":"init","B":"init"},"defaultUser":"root","defaultWorkdir":"/"}"#;
    assert_eq!(daemon.call("POST", "/init", &[], init).status, 204);
    let request = serde_json::json!({"process": {
        "cmd": "sh", "args": ["-c", "echo $A $B $HOME $PWD"], "envs": {"B": "request"},
    }});
    let outcome = daemon.open("Start", &[], &request.to_string()).collect();
    assert_eq!(
        String::from_utf8(outcome.stdout).unwrap(),
        "init request /root /\n"
    );
    assert_eq!(outcome.error, None);
}

#[test]
fn process_becomes_the_user_with_all_its_groups() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: process_becomes_the_user_with_all_its_groups: needs root");
        return;
    }
    let daemon = Daemon::start();
    let as_user = |name: &str| {
        // base64 of "nobody:" and of "no-such:".
        let value = if name == "nobody" {
            "Basic bm9ib2R5Og=="
        } else {
            "Basic bm8tc3VjaDo="
        };
        let script = "id -u; id -G; grep -E '^(Uid|Gid):' /proc/self/status; id -G nobody";
        daemon.run(script, &[("authorization", value)])
    };
    let outcome = as_user("nobody");
    let text = String::from_utf8(outcome.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "65534");
    assert_eq!(
        lines[1], lines[4],
        "the groups of the account and no others: {text}"
    );
    assert_eq!(lines[2], "Uid:\t65534\t65534\t65534\t65534");
    assert_eq!(as_user("no-such").error.as_deref(), Some("unauthenticated"));
}

#[test]
fn access_token_is_asked_for_once_it_is_set() {
    let daemon = Daemon::start();
    assert_eq!(
        daemon
            .call("POST", "/init", &[], r#"{"accessToken":"secret"}"#)
            .status,
        204
    );
    let refused = daemon.call("POST", "/init", &[], "{}");
    assert_eq!(refused.status, 401);
    assert!(
        refused.body.starts_with(r#"{"code":401,"message":"#),
        "{}",
        refused.body
    );
    let refused = daemon.unary("List", "{}");
    assert_eq!(refused.status, 401);
    assert!(
        refused.body.contains(r#""code":"unauthenticated""#),
        "{}",
        refused.body
    );
    assert_eq!(daemon.call("GET", "/health", &[], "").status, 200);
    let token = [("x-access-token", "secret")];
    assert_eq!(daemon.run("exit 0", &token).end.unwrap().exit_code, 0);
    assert_eq!(
        daemon
            .call("POST", "/init", &token, r#"{"accessToken":"next"}"#)
            .status,
        204
    );
    assert_eq!(daemon.call("POST", "/init", &token, "{}").status, 401);
}

#[test]
fn bad_init_names_its_field_and_changes_nothing() {
    let daemon = Daemon::start();
    let answer = daemon.call(
        "POST",
        "/init",
        &[],
        r#"{"accessToken":"t","timestamp":"noon"}"#,
    );
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("timestamp"), "{}", answer.body);
    assert_eq!(
        daemon.unary("List", "{}").status,
        200,
        "the token was not set"
    );
    let answer = daemon.call("GET", "/nowhere", &[], "");
    assert_eq!(answer.status, 404);
    assert!(answer.body.starts_with(r#"{"code":404"#), "{}", answer.body);
}

#[test]
fn prepare_answers_and_lets_connections_go() {
    let daemon = Daemon::start();
    let mut idle = daemon.keep_open();
    assert_eq!(
        daemon
            .call("POST", "/snapshot/prepare?timeout_ms=500", &[], "")
            .status,
        204
    );
    assert_eq!(
        idle.read(&mut [0; 16]).unwrap(),
        0,
        "the idle connection was closed"
    );
    assert_eq!(
        daemon
            .call("POST", "/snapshot/prepare?timeout_ms=0", &[], "")
            .status,
        400
    );
    assert_eq!(
        daemon.run("echo x", &[]).stdout,
        b"x\n",
        "it goes on serving"
    );
}

#[test]
fn binary_protobuf_is_spoken_as_well() {
    let daemon = Daemon::start();
    // StartRequest { process(1): { cmd(1): "echo", args(2): "hi" } }
    let process = [b"\x0a\x04echo".as_slice(), b"\x12\x02hi"].concat();
    let mut request = vec![0x0a, u8::try_from(process.len()).unwrap()];
    request.extend(process);
    let framed = envd::protocol::envelope::encode_message(&request).unwrap();
    let headers = [("content-type", "application/connect+proto")];
    let (status, body) =
        read_response(daemon.send("POST", "/process.Process/Start", &headers, &framed));
    assert_eq!(status, 200);
    // StartResponse { event(1): { data(2): { stdout(1): "hi\n" } } }
    let data = b"\x0a\x07\x12\x05\x0a\x03hi\n";
    assert!(
        body.windows(data.len()).any(|window| window == data),
        "{body:02x?}"
    );
}

#[test]
fn first_process_reaps_orphans_and_keeps_its_own_childrens_status() {
    let Some(daemon) = Daemon::start_as_first_process() else {
        let reason = "needs root and unshare(1)";
        println!(
            "skipped: first_process_reaps_orphans_and_keeps_its_own_childrens_status: {reason}"
        );
        return;
    };
    assert_eq!(daemon.run("cat /proc/1/comm", &[]).stdout, b"envd\n");
    for _ in 0..20 {
        let outcome = daemon.run("(sleep 0.02 &) ; (true &) ; exit 5", &[]);
        assert_eq!(outcome.end.unwrap().exit_code, 5);
    }
    std::thread::sleep(Duration::from_millis(200));
    let zombies = daemon.run("cat /proc/[0-9]*/status | grep -c '^State:.Z'", &[]);
    assert_eq!(String::from_utf8(zombies.stdout).unwrap(), "0\n");
}

/// Whether a process has ended; one that was just killed may take a moment to be reaped.
fn is_gone(pid: u32) -> bool {
    let stat = Path::new("/proc").join(pid.to_string()).join("stat");
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        match std::fs::read_to_string(&stat) {
            Ok(text) if !text.contains(") Z ") => std::thread::sleep(Duration::from_millis(10)),
            _ => return true,
        }
    }
    false
}
