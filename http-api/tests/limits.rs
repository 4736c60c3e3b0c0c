//! What a request may cost, between real sockets: who sends too much, too slowly, or too many at the
//! same time is told so in the words of whom he asks, and lets go of what he held.

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use http_api::auth::Access;
use http_api::options::{Limits, Options};
use http_api::router;
use http_api::server::{ConnectionLimits, serve};
use serde_json::Value;
use support::Fake;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);

async fn listen(limits: Limits, connections: ConnectionLimits) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let options = Options {
        limits,
        ..Access::open().into()
    };
    let router = router(Fake::default(), options);
    tokio::spawn(serve(listener, router, connections, std::future::pending()));
    address
}

/// Status and body of what comes back for these bytes, until the host closes.
async fn answer(at: SocketAddr, bytes: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(at).await.unwrap();
    // It may be refused while it is being sent.
    let _ = stream.write_all(bytes).await;
    let mut said = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut said)).await;
    let _ = read.expect("the host answers and closes");
    let said = String::from_utf8(said).unwrap();
    let status = said.split(' ').nth(1).map_or(0, |s| s.parse().unwrap());
    let body = said.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, body.to_owned())
}

fn head(line: &str, fields: &str) -> Vec<u8> {
    format!("{line} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{fields}\r\n").into_bytes()
}

fn code(body: &str) -> String {
    let body: Value = serde_json::from_str(body).unwrap();
    let native = body["code"].as_str();
    native
        .or(body["error_code"].as_str())
        .or(body["error"]["code"].as_str())
        .unwrap()
        .to_owned()
}

#[tokio::test]
async fn a_head_that_is_too_long_is_refused_in_the_words_of_whom_it_asks() {
    let connections = ConnectionLimits {
        head_bytes: 8192,
        ..ConnectionLimits::default()
    };
    let at = listen(Limits::default(), connections).await;
    for (path, word) in [
        ("/v1/host", "head_too_large"),
        ("/sandboxes", "head_too_large"),
        ("/v1/capsules", "invalid_request"),
    ] {
        let line = format!("GET {path}");
        let fits = head(&line, &format!("x: {}\r\n", "y".repeat(6000)));
        let (status, body) = answer(at, &fits).await;
        assert_eq!(status, 200, "{path}: {body}");
        let long = head(&line, &format!("x: {}\r\n", "y".repeat(9000)));
        let (status, body) = answer(at, &long).await;
        assert_eq!((status, code(&body)), (431, word.to_owned()), "{path}");
    }
    // So long that nobody reads what it is for.
    let (status, _) = answer(
        at,
        &head("GET /v1/host", &format!("x: {}\r\n", "y".repeat(99_000))),
    )
    .await;
    assert_eq!(status, 431);
    let many: String = (0..200).map(|n| format!("x{n}: y\r\n")).collect();
    assert_eq!(answer(at, &head("GET /v1/host", &many)).await.0, 431);
}

#[tokio::test]
async fn a_body_that_is_too_long_is_refused_before_it_is_read() {
    let limits = Limits {
        body_bytes: 64,
        ..Limits::default()
    };
    let at = listen(limits, ConnectionLimits::default()).await;
    for (path, word) in [
        ("/v1/sandboxes", "body_too_large"),
        ("/sandboxes", "body_too_large"),
        ("/v1/capsules", "invalid_request"),
    ] {
        // Announced, and never sent.
        let announced = head(&format!("POST {path}"), "content-length: 65\r\n");
        let (status, body) = answer(at, &announced).await;
        assert_eq!((status, code(&body)), (413, word.to_owned()), "{path}");
        // Not announced.
        let mut chunked = head(&format!("POST {path}"), "transfer-encoding: chunked\r\n");
        chunked.extend_from_slice(format!("41\r\n{}\r\n0\r\n\r\n", "x".repeat(65)).as_bytes());
        let (status, body) = answer(at, &chunked).await;
        assert_eq!((status, code(&body)), (413, word.to_owned()), "{path}");
    }
}

#[tokio::test]
async fn who_sends_a_head_or_a_body_byte_by_byte_is_let_go() {
    let limits = Limits {
        body_time: Duration::from_millis(200),
        ..Limits::default()
    };
    let connections = ConnectionLimits {
        head_time: Duration::from_millis(200),
        connections: 2,
        ..ConnectionLimits::default()
    };
    let at = listen(limits, connections).await;
    let drip = |first: Vec<u8>| async move {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(&first).await.unwrap();
        let mut said = Vec::new();
        let dripping = async {
            let (mut read, mut write) = stream.split();
            let drops = async {
                while write.write_all(b"a").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::select! {
                () = drops => {}
                _ = read.read_to_end(&mut said) => {}
            }
        };
        timeout(PATIENCE, dripping).await.expect("it is let go");
        String::from_utf8(said).unwrap()
    };
    let late = head("POST /v1/sandboxes", "content-length: 60000\r\n");
    let (slow_head, slow_body) =
        tokio::join!(drip(b"GET /v1/host HTTP/1.1\r\nx: ".to_vec()), drip(late));
    assert!(!slow_head.contains(" 200 "), "{slow_head}");
    assert!(slow_body.starts_with("HTTP/1.1 408 "), "{slow_body}");
    // Their places are free.
    for _ in 0..3 {
        assert_eq!(answer(at, &head("GET /v1/host", "")).await.0, 200);
    }
}

#[tokio::test]
async fn streams_beyond_their_number_are_refused_until_one_ends() {
    let limits = Limits {
        streams: 2,
        ..Limits::default()
    };
    let at = listen(limits, ConnectionLimits::default()).await;
    let socket = |path: &str| {
        let fields = "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\
                      sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
        format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{fields}\r\n").into_bytes()
    };
    let open = |bytes: Vec<u8>| async move {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let mut first = [0; 12];
        timeout(PATIENCE, stream.read_exact(&mut first))
            .await
            .unwrap()
            .unwrap();
        (stream, String::from_utf8(first.to_vec()).unwrap())
    };
    let (pty, said) = open(socket("/v1/sandboxes/a/pty")).await;
    assert_eq!(said, "HTTP/1.1 101");
    let (exec, said) = open(socket("/v1/capsules/a/exec/stream")).await;
    assert_eq!(said, "HTTP/1.1 101");
    for (path, word) in [
        ("/v1/sandboxes/a/wait", "busy"),
        ("/v1/events", "busy"),
        ("/v1/sandboxes/a/pty", "busy"),
        ("/v1/capsules/a/pty", "host_unavailable"),
    ] {
        let (status, body) = answer(at, &head(&format!("GET {path}"), "")).await;
        assert_eq!((status, code(&body)), (429, word.to_owned()), "{path}");
    }
    // What is no stream is met all the same.
    assert_eq!(answer(at, &head("GET /v1/host", "")).await.0, 200);
    // Clients that go away give their places back.
    drop((pty, exec));
    let freed = async {
        while answer(at, &head("GET /v1/sandboxes/a/wait", "")).await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, freed)
        .await
        .expect("a place is free again");
}

#[tokio::test]
async fn a_trace_is_found_again_in_an_answer_and_a_foreign_one_is_ignored() {
    let at = listen(Limits::default(), ConnectionLimits::default()).await;
    let id = "4bf92f3577b34da6a3ce929d0e0e4736";
    let fields = format!("traceparent: 00-{id}-00f067aa0ba902b7-01\r\n");
    let (status, body) = answer(at, &head("GET /v1/sandboxes/No", &fields)).await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (status, &body["trace_id"]),
        (400, &Value::from(id)),
        "{body}"
    );
    for bad in ["traceparent: nonsense\r\n", ""] {
        let (status, body) = answer(at, &head("GET /v1/sandboxes/No", bad)).await;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(status, 400, "{body}");
        assert!(body.get("trace_id").is_none(), "{body}");
        assert!(
            body["request_id"].as_str().unwrap().starts_with("req-"),
            "{body}"
        );
    }
}
