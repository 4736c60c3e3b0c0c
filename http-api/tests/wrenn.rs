//! The routes of Wrenn's clients over a control plane that only plays: what travels, and in which
//! words a request is refused.

mod support;

use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use futures_util::{SinkExt, StreamExt};
use http_api::auth::Access;
use http_api::server::{ConnectionLimits, serve};
use http_api::wire::SandboxState;
use http_api::{ApiError, router};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use support::Fake;
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::Message;
use tower::ServiceExt;

const PATIENCE: Duration = Duration::from_secs(60);

async fn send(fake: Fake, method: &str, path: &str, body: Value) -> (u16, Value) {
    let request = Request::builder().method(method).uri(path);
    let request = request.body(Body::from(body.to_string())).unwrap();
    let response = router(fake, Access::open()).oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let body = serde_json::from_slice(&bytes);
    let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
    (status, body.unwrap_or_else(|_| text()))
}

async fn ask(method: &str, path: &str, body: Value) -> (u16, Value) {
    send(Fake::default(), method, path, body).await
}

#[tokio::test]
async fn a_capsule_is_a_sandbox_whose_time_begins_anew() {
    for root in ["/v1/capsules", "/api/v1/capsules"] {
        let wanted = json!({
            "template": "base", "vcpus": 2, "timeout_sec": 5, "metadata": { "owner": "me" },
            "a_newer_field": 1,
        });
        let (status, made) = ask("POST", root, wanted).await;
        assert_eq!(status, 201, "{made}");
        assert_eq!(made["status"], "running");
        assert_eq!(made["vcpus"], 2);
        assert_eq!(made["timeout_sec"], 60, "less than a minute is a minute");
        assert_eq!(made["metadata"], json!({ "owner": "me" }));
        assert!(
            made["created_at"].as_str().unwrap().ends_with('Z'),
            "{made}"
        );
        let (status, none) = ask("POST", root, json!({ "template": "base" })).await;
        assert_eq!((status, &none["timeout_sec"]), (201, &json!(0)));
    }
}

#[tokio::test]
async fn every_route_answers_in_its_words() {
    for (method, path, body, status) in [
        ("GET", "", json!({}), 200),
        ("GET", "/stats", json!({}), 200),
        ("GET", "/a", json!({}), 200),
        ("DELETE", "/a", json!({}), 204),
        ("POST", "/a/pause", json!({}), 200),
        ("POST", "/a/resume", json!({}), 200),
        ("POST", "/a/ping", json!({}), 204),
        ("GET", "/a/metrics", json!({}), 200),
        ("POST", "/a/exec", json!({ "cmd": "true" }), 200),
        (
            "POST",
            "/a/exec",
            json!({ "cmd": "true", "background": true }),
            202,
        ),
        ("GET", "/a/processes", json!({}), 200),
        ("DELETE", "/a/processes/7", json!({}), 204),
        ("POST", "/a/files/read", json!({ "path": "/x" }), 200),
        ("POST", "/a/files/stream/read", json!({ "path": "/x" }), 200),
        (
            "POST",
            "/a/files/list",
            json!({ "path": "/x", "depth": 2 }),
            200,
        ),
        ("POST", "/a/files/mkdir", json!({ "path": "/x" }), 201),
        ("POST", "/a/files/remove", json!({ "path": "/x" }), 204),
    ] {
        for root in ["/v1/capsules", "/api/v1/capsules"] {
            let path = format!("{root}{path}");
            let (found, body) = ask(method, &path, body.clone()).await;
            assert_eq!(found, status, "{method} {path}: {body}");
        }
    }
    let (_, list) = ask(
        "POST",
        "/v1/capsules/a/files/list",
        json!({ "path": "/x", "depth": 2 }),
    )
    .await;
    let entry = &list["entries"][0];
    assert_eq!(
        (&entry["type"], &entry["modified_at"]),
        (&json!("directory"), &json!(7))
    );
    let (_, run) = ask(
        "POST",
        "/v1/capsules/a/exec",
        json!({ "cmd": "x", "timeout_sec": 7 }),
    )
    .await;
    assert_eq!(
        (&run["exit_code"], &run["stderr"]),
        (&json!(3), &json!("7000 ms"))
    );
    assert_eq!(run["encoding"], "utf-8");
    let background = json!({ "cmd": "x", "background": true, "tag": "mine" });
    let (_, runs) = ask("POST", "/v1/capsules/a/exec", background).await;
    assert_eq!((&runs["pid"], &runs["tag"]), (&json!(7), &json!("mine")));
}

#[tokio::test]
async fn snapshots_have_their_own_root() {
    let wanted = json!({ "sandbox_id": "a", "name": "t" });
    let (status, made) = ask("POST", "/api/v1/snapshots", wanted.clone()).await;
    assert_eq!((status, &made["type"]), (201, &json!("snapshot")), "{made}");
    let (status, error) = ask("POST", "/api/v1/snapshots?overwrite=true", wanted).await;
    assert_eq!(status, 400, "{error}");
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("overwrite")
    );
    let (_, all) = ask("GET", "/api/v1/snapshots?type=snapshot", json!({})).await;
    assert_eq!(all.as_array().unwrap().len(), 1, "{all}");
    let (_, none) = ask("GET", "/api/v1/snapshots?type=base", json!({})).await;
    assert_eq!(none, json!([]));
    assert_eq!(ask("DELETE", "/api/v1/snapshots/t", json!({})).await.0, 204);
}

#[tokio::test]
async fn errors_have_the_words_that_its_clients_know() {
    let denied = ApiError::Denied {
        state: SandboxState::Paused,
        detail: "It is paused".into(),
    };
    let absent = ApiError::NotFound {
        what: "sandbox",
        name: "a".into(),
    };
    let busy = ApiError::Busy {
        detail: "Too many".into(),
    };
    for (error, status, code) in [
        (denied, 409, "invalid_state"),
        (absent, 404, "not_found"),
        (busy, 429, "host_unavailable"),
    ] {
        let fake = Fake::refusing(error);
        let (found, body) = send(fake, "GET", "/v1/capsules/a", json!({})).await;
        assert_eq!(
            (found, &body["error"]["code"]),
            (status, &json!(code)),
            "{body}"
        );
        assert!(!body["error"]["message"].as_str().unwrap().is_empty());
    }
    for (method, path, body, code) in [
        ("GET", "/v1/capsules/No", json!({}), "not_found"),
        ("GET", "/v1/capsules/a/nothing", json!({}), "not_found"),
        ("GET", "/api/elsewhere", json!({}), "not_found"),
        (
            "POST",
            "/v1/capsules",
            json!({ "template": "../x" }),
            "invalid_request",
        ),
        (
            "POST",
            "/v1/capsules",
            json!({ "timeout_sec": "soon" }),
            "invalid_request",
        ),
        (
            "POST",
            "/v1/capsules/a/exec",
            json!({ "cmd": "" }),
            "invalid_request",
        ),
        (
            "POST",
            "/v1/capsules/a/files/read",
            json!({ "path": "" }),
            "invalid_request",
        ),
        (
            "POST",
            "/v1/capsules/a/files/mkdir",
            json!({ "path": "/there" }),
            "conflict",
        ),
        ("GET", "/v1/capsules/a/pty", json!({}), "invalid_request"),
    ] {
        let (_, answer) = ask(method, path, body).await;
        assert_eq!(answer["error"]["code"], code, "{method} {path}: {answer}");
    }
}

#[tokio::test]
async fn a_file_is_passed_on_from_a_form_and_a_broken_form_is_none() {
    let form = |parts: &str, end: &str| {
        let body = format!("{parts}--b{end}\r\n")
            .replace('\n', "\r\n")
            .replace("\r\r", "\r");
        let request = Request::builder()
            .method("POST")
            .uri("/v1/capsules/a/files/write")
            .header("content-type", "multipart/form-data; boundary=b")
            .body(Body::from(body))
            .unwrap();
        router(Fake::default(), Access::open()).oneshot(request)
    };
    let path = "--b\nContent-Disposition: form-data; name=\"path\"\n\n/x\n";
    let file = "--b\nContent-Disposition: form-data; name=\"file\"; filename=\"u\"\n\nhello\n";
    let written = form(&format!("{path}{file}"), "--").await.unwrap();
    assert_eq!(written.status(), 204);
    for (parts, word) in [(path, "file"), (file, "path")] {
        let refused = form(parts, "--").await.unwrap();
        assert_eq!(refused.status(), 400);
        let body = refused.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap();
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.starts_with(word), "{message}");
    }
}

async fn listen() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = router(Fake::default(), Access::open());
    let limits = ConnectionLimits::default();
    tokio::spawn(serve(listener, router, limits, std::future::pending()));
    format!("ws://{address}/api/v1/capsules/a")
}

/// Everything that is said until the host closes.
async fn talk(url: String, first: Option<Value>) -> Vec<Message> {
    let stream = tokio::net::TcpStream::connect(&url[5..url[5..].find('/').unwrap() + 5]);
    let stream = stream.await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async(&url, stream).await.unwrap();
    if let Some(first) = first {
        socket.send(Message::text(first.to_string())).await.unwrap();
    }
    let mut said = Vec::new();
    let listening = async {
        while let Some(Ok(message)) = socket.next().await {
            match message {
                Message::Close(_) => break,
                Message::Ping(_) | Message::Pong(_) => {}
                message => said.push(message),
            }
        }
    };
    tokio::time::timeout(PATIENCE, listening).await.unwrap();
    said
}

fn json_of(message: &Message) -> Value {
    serde_json::from_str(message.to_text().unwrap()).unwrap()
}

#[tokio::test]
async fn a_terminals_bytes_come_as_they_are() {
    let url = format!("{}/pty", listen().await);
    let start =
        json!({ "type": "start", "cmd": "sh", "cols": 80, "rows": 24, "envs": { "A": "b" } });
    let said = talk(url, Some(start)).await;
    assert_eq!(json_of(&said[0])["type"], "started");
    assert_eq!(said[1], Message::binary(&b"24 80"[..]));
    assert_eq!(json_of(&said[2]), json!({ "type": "exit", "exit_code": 3 }));
}

#[tokio::test]
async fn commands_and_processes_that_run_already_are_listened_to() {
    let root = listen().await;
    let start = json!({ "type": "start", "cmd": "echo", "args": ["one", "two"] });
    let said = talk(format!("{root}/exec/stream"), Some(start)).await;
    let kinds: Vec<Value> = said.iter().map(|m| json_of(m)["type"].clone()).collect();
    assert_eq!(kinds, ["start", "stdout", "exit"]);
    let said = talk(format!("{root}/processes/mine/stream"), None).await;
    assert_eq!(json_of(&said[0]), json!({ "type": "start", "pid": 8 }));
    assert_eq!(json_of(said.last().unwrap())["type"], "exit");
}
