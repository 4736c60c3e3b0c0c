//! Commands and terminals over WebSockets, between real sockets and a control plane that plays.

mod support;

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use http_api::auth::Access;
use http_api::router;
use http_api::server::{ConnectionLimits, serve};
use serde_json::{Value, json};
use support::Fake;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

type Socket = WebSocketStream<TcpStream>;

/// A server, and a connection to one of its routes.
async fn open(fake: Fake, path: &str) -> Result<Socket, Error> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = router(fake, Access::open());
    let never = std::future::pending();
    tokio::spawn(serve(listener, router, ConnectionLimits::default(), never));
    let stream = TcpStream::connect(address).await.unwrap();
    let url = format!("ws://{address}{path}");
    client_async(url, stream).await.map(|(socket, _)| socket)
}

async fn say(socket: &mut Socket, message: Value) {
    socket
        .send(Message::text(message.to_string()))
        .await
        .unwrap();
}

/// All messages until the server closes.
async fn hear(socket: &mut Socket) -> Vec<Value> {
    let mut heard = Vec::new();
    let listening = async {
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Text(text) = message {
                heard.push(serde_json::from_str(&text).unwrap());
            }
        }
    };
    timeout(Duration::from_secs(60), listening)
        .await
        .expect("in time");
    heard
}

#[tokio::test]
async fn a_command_says_what_it_does_and_ends() {
    let mut socket = open(Fake::default(), "/v1/sandboxes/a/exec/stream")
        .await
        .unwrap();
    say(
        &mut socket,
        json!({ "type": "start", "cmd": "echo", "args": ["a", "ü"] }),
    )
    .await;
    let expected = [
        json!({ "type": "start", "pid": 7 }),
        json!({ "type": "stdout", "data": "a ü" }),
        json!({ "type": "exit", "exit_code": 3 }),
    ];
    assert_eq!(hear(&mut socket).await, expected);
}

#[tokio::test]
async fn a_command_ends_when_it_is_told_to_or_nobody_listens() {
    for stop in [true, false] {
        let fake = Fake::default();
        let mut killed = fake.killed.subscribe();
        let mut socket = open(fake, "/v1/sandboxes/a/exec/stream").await.unwrap();
        say(&mut socket, json!({ "type": "start", "cmd": "sleep" })).await;
        let first = socket.next().await.unwrap().unwrap();
        assert!(first.to_text().unwrap().contains("\"start\""), "{first}");
        if stop {
            say(&mut socket, json!({ "type": "stop" })).await;
            let end = hear(&mut socket).await.pop();
            assert_eq!(end, Some(json!({ "type": "exit", "exit_code": -1 })));
        } else {
            drop(socket);
        }
        let pid = timeout(Duration::from_secs(60), killed.wait_for(|pid| *pid != 0)).await;
        assert_eq!(*pid.expect("in time").unwrap(), 7);
    }
}

#[tokio::test]
async fn a_first_message_that_starts_nothing_is_told_so() {
    for (message, says) in [
        (json!({ "type": "stop" }), "`start` with a `cmd`"),
        (json!({ "type": "start" }), "cmd"),
        (
            json!({ "type": "start", "cmd": "" }),
            "`start` with a `cmd`",
        ),
        (
            json!({ "type": "start", "cmd": "absent" }),
            "no such program",
        ),
        (json!("start"), "first message"),
    ] {
        let mut socket = open(Fake::default(), "/v1/sandboxes/a/exec/stream")
            .await
            .unwrap();
        say(&mut socket, message.clone()).await;
        let said = hear(&mut socket).await;
        assert_eq!(
            (said.len(), &said[0]["type"]),
            (1, &json!("error")),
            "{message}"
        );
        assert!(
            said[0]["data"].as_str().unwrap().contains(says),
            "{message}: {said:?}"
        );
    }
}

#[tokio::test]
async fn a_terminal_is_started_found_again_and_ended() {
    let mut socket = open(Fake::default(), "/v1/sandboxes/a/pty").await.unwrap();
    let start = json!({ "type": "start", "cmd": "sleep", "cols": 90, "rows": 30, "tag": "mine" });
    say(&mut socket, start).await;
    say(&mut socket, json!({ "type": "input", "data": "aGk=" })).await;
    say(
        &mut socket,
        json!({ "type": "resize", "cols": 80, "rows": 20 }),
    )
    .await;
    say(&mut socket, json!({ "type": "kill" })).await;
    let expected = [
        json!({ "type": "started", "pid": 7, "tag": "mine" }),
        json!({ "type": "output", "data": "MzAgOTA=" }),
        json!({ "type": "exit", "exit_code": -1 }),
    ];
    assert_eq!(hear(&mut socket).await, expected);

    let mut again = open(Fake::default(), "/v1/sandboxes/a/pty").await.unwrap();
    say(&mut again, json!({ "type": "connect", "tag": "mine" })).await;
    let expected = [
        json!({ "type": "started", "pid": 8, "tag": "mine" }),
        json!({ "type": "exit", "exit_code": 0 }),
    ];
    assert_eq!(hear(&mut again).await, expected);

    for wrong in [
        json!({ "type": "connect", "tag": "other" }),
        json!({ "type": "input", "data": "aGk=" }),
        json!({ "type": "start", "cols": 90 }),
    ] {
        let mut socket = open(Fake::default(), "/v1/sandboxes/a/pty").await.unwrap();
        say(&mut socket, wrong.clone()).await;
        assert_eq!(hear(&mut socket).await[0]["type"], "error", "{wrong}");
    }
}

#[tokio::test]
async fn what_is_no_socket_of_a_running_sandbox_is_refused_before() {
    let gone = Fake::refusing(http_api::ApiError::NotFound {
        what: "sandbox",
        name: "a".into(),
    });
    for path in ["/v1/sandboxes/a/exec/stream", "/v1/sandboxes/a/pty"] {
        match open(gone.clone(), path).await {
            Err(Error::Http(response)) => assert_eq!(response.status(), 404),
            other => panic!("{other:?}"),
        }
    }
}
