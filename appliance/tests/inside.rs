//! What is inside of a real guest, through the native API: commands and terminals as they go,
//! files, processes.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};
use support::daemon::Daemon;
use support::needs;
use support::place::Place;
use support::skip;
use tungstenite::{Message, WebSocket};

/// A WebSocket over the daemon's Unix socket.
fn open(place: &Place, path: &str) -> Result<WebSocket<UnixStream>, u16> {
    let stream = UnixStream::connect(place.socket()).unwrap();
    let patience = Some(Duration::from_secs(120));
    stream.set_read_timeout(patience).unwrap();
    match tungstenite::client(format!("ws://thaw{path}"), stream) {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::HandshakeError::Failure(tungstenite::Error::Http(response))) => {
            Err(response.status().as_u16())
        }
        Err(other) => panic!("{other}"),
    }
}

#[track_caller]
fn say(socket: &mut WebSocket<UnixStream>, message: &Value) {
    if let Err(error) = socket.send(Message::text(message.to_string())) {
        // What was said before it was closed tells why.
        panic!("{message}: {error}, after {}", hear(socket));
    }
}

/// The next message that is one of ours.
#[track_caller]
fn hear(socket: &mut WebSocket<UnixStream>) -> Value {
    loop {
        match socket.read().unwrap() {
            Message::Text(text) => return serde_json::from_str(&text).unwrap(),
            Message::Close(_) => panic!("closed"),
            _ => {}
        }
    }
}

/// Until a message of this type; all of them.
fn hear_until(socket: &mut WebSocket<UnixStream>, kind: &str) -> Vec<Value> {
    let mut heard = Vec::new();
    loop {
        heard.push(hear(socket));
        if heard.last().unwrap()["type"] == kind {
            return heard;
        }
    }
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

fn decoded(messages: &[Value]) -> String {
    use base64::Engine as _;
    let outputs = messages
        .iter()
        .filter(|message| message["type"] == "output");
    let bytes = outputs.flat_map(|message| {
        let data = message["data"].as_str().unwrap();
        base64::engine::general_purpose::STANDARD
            .decode(data)
            .unwrap()
    });
    String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
}

#[test]
fn guest_is_worked_in_through_streams_and_files() {
    let test = "guest_is_worked_in_through_streams_and_files";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(test, &reason),
    };
    let _turn = needs::one_at_a_time();
    let place = Place::new("tinside", 46, Some(&inputs));
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    api.create("one", "base");

    commands(&place, &daemon);
    terminals(&place);
    files(&place, &daemon);

    // A stream ends with the run of its sandbox, and says so; then there is none to be had.
    let mut socket = open(&place, "/v1/sandboxes/one/exec/stream").unwrap();
    say(
        &mut socket,
        &json!({ "type": "start", "cmd": "sleep", "args": ["600"] }),
    );
    assert_eq!(hear(&mut socket)["type"], "start");
    api.pause("one").expect(200);
    let end = hear(&mut socket);
    assert!(end["data"].as_str().unwrap().contains("paused"), "{end}");
    assert_eq!(
        open(&place, "/v1/sandboxes/one/exec/stream").unwrap_err(),
        409
    );
    assert_eq!(open(&place, "/v1/sandboxes/none/pty").unwrap_err(), 404);
    api.destroy("one");
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}

fn commands(place: &Place, daemon: &Daemon) {
    let path = "/v1/sandboxes/one/exec/stream";
    let mut socket = open(place, path).unwrap();
    let script = "echo out; sleep 0.2; echo err >&2; exit 7";
    say(
        &mut socket,
        &json!({ "type": "start", "cmd": "sh", "args": ["-c", script] }),
    );
    let heard = hear_until(&mut socket, "exit");
    let kinds: Vec<_> = heard.iter().map(|m| m["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["start", "stdout", "stderr", "exit"], "{heard:?}");
    assert_eq!(
        (&heard[1]["data"], &heard[3]["exit_code"]),
        (&json!("out\n"), &json!(7))
    );

    // Told to stop, it ends, and all that it started.
    let mut socket = open(place, path).unwrap();
    let script = "sleep 600 & sleep 600";
    say(
        &mut socket,
        &json!({ "type": "start", "cmd": "sh", "args": ["-c", script] }),
    );
    let pid = hear(&mut socket)["pid"].as_u64().unwrap();
    let listed = daemon.api.get("/v1/sandboxes/one/processes").expect(200);
    let ours = listed.as_array().unwrap().iter().find(|p| p["pid"] == pid);
    assert_eq!(ours.unwrap()["cmd"], "sh", "{listed}");
    say(&mut socket, &json!({ "type": "stop" }));
    assert_eq!(hear(&mut socket)["exit_code"], -1);

    // Whose listener goes away ends, too.
    let mut socket = open(place, path).unwrap();
    say(
        &mut socket,
        &json!({ "type": "start", "cmd": "sleep", "args": ["601"] }),
    );
    hear(&mut socket);
    drop(socket);
    support::wait_for("it ends", Duration::from_secs(60), || {
        let listed = daemon.api.get("/v1/sandboxes/one/processes").expect(200);
        listed.as_array().unwrap().is_empty().then_some(())
    });

    // A signal that it may catch.
    let mut socket = open(place, path).unwrap();
    let script = "trap 'echo caught; exit 4' TERM; echo ready; while :; do sleep 0.1; done";
    say(
        &mut socket,
        &json!({ "type": "start", "cmd": "sh", "args": ["-c", script] }),
    );
    let heard = hear_until(&mut socket, "stdout");
    let path = format!("/v1/sandboxes/one/processes/{}/signal", heard[0]["pid"]);
    daemon
        .api
        .post(&path, &json!({ "signal": "SIGTERM" }))
        .expect(204);
    let heard = hear_until(&mut socket, "exit");
    assert_eq!(heard.last().unwrap()["exit_code"], 4, "{heard:?}");
    daemon
        .api
        .post(&path, &json!({ "signal": "SIGTERM" }))
        .expect(404);
    daemon
        .api
        .post(&path, &json!({ "signal": "TERM" }))
        .expect(400);
}

fn terminals(place: &Place) {
    let path = "/v1/sandboxes/one/pty";
    let mut socket = open(place, path).unwrap();
    say(
        &mut socket,
        &json!({ "type": "start", "cols": 90, "rows": 30, "user": "root" }),
    );
    let started = hear(&mut socket);
    let tag = started["tag"].as_str().unwrap().to_owned();
    say(
        &mut socket,
        &json!({ "type": "resize", "cols": 100, "rows": 40 }),
    );
    let input = "stty size; echo to-$((40 + 2))\n";
    say(
        &mut socket,
        &json!({ "type": "input", "data": base64(input) }),
    );
    let mut heard = Vec::new();
    while !decoded(&heard).contains("to-42") {
        heard.push(hear(&mut socket));
    }
    assert!(decoded(&heard).contains("40 100"), "{}", decoded(&heard));
    // It goes on without us.
    drop(socket);
    let mut socket = open(place, path).unwrap();
    say(&mut socket, &json!({ "type": "connect", "tag": tag }));
    assert_eq!(hear(&mut socket)["pid"], started["pid"]);
    say(
        &mut socket,
        &json!({ "type": "input", "data": base64("exit 5\n") }),
    );
    let heard = hear_until(&mut socket, "exit");
    assert_eq!(heard.last().unwrap()["exit_code"], 5);
}

fn files(place: &Place, daemon: &Daemon) {
    let path = "/v1/sandboxes/one/files?path=%2Ftmp%2Fd%2Fa%20b&user=root";
    // More than any buffer between here and there, and than a control request may have.
    let content: Vec<u8> = (0..5 << 20).map(|n: u32| (n % 251) as u8).collect();
    let mut stream = UnixStream::connect(place.socket()).unwrap();
    let head = "HTTP/1.1\r\nhost: thaw\r\nconnection: close";
    let length = content.len();
    write!(
        stream,
        "PUT {path} {head}\r\ncontent-length: {length}\r\n\r\n"
    )
    .unwrap();
    stream.write_all(&content).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.ends_with(r#"{"path":"/tmp/d/a b"}"#), "{answer}");

    let mut stream = UnixStream::connect(place.socket()).unwrap();
    write!(stream, "GET {path} {head}\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let body = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    assert!(answer[body..] == content, "{} bytes", answer.len() - body);

    let list = "/v1/sandboxes/one/files/list?path=%2Ftmp%2Fd&user=root";
    let listed = daemon.api.get(list).expect(200);
    assert_eq!(listed[0]["name"], "a b", "{listed}");
    assert_eq!(
        (&listed[0]["kind"], &listed[0]["size"]),
        (&json!("file"), &json!(length))
    );
    let at = |path: &str| {
        daemon
            .api
            .get(&format!("/v1/sandboxes/one/files?path={path}"))
    };
    at("%2Fnone").expect(404);
    at("%2Ftmp").expect(400);
    at("").expect(400);
}
