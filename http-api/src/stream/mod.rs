//! Processes over WebSockets: one command with its output, or a terminal to come back to.

pub(crate) mod exec;
pub(crate) mod pty;
mod text;

use std::time::Duration;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control_plane::ControlPlane;
use crate::ids::SandboxId;
use crate::problem::ApiError;
use crate::wire::SandboxState;

/// The longest message of a client.
const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// How long a client may take to say what it wants.
const FIRST_MESSAGE: Duration = Duration::from_secs(30);
/// How long a client may take to close its side.
const CLOSE: Duration = Duration::from_secs(5);
/// How often a silent connection is asked whether it is there.
const PING: Duration = Duration::from_secs(30);

/// Before the connection becomes a WebSocket: an unknown sandbox is a 404, one that does not run a
/// 409 with its state.
pub(crate) async fn must_run<C: ControlPlane>(control: &C, id: &SandboxId) -> Result<(), ApiError> {
    let sandbox = control.get(id.clone()).await?;
    match sandbox.state {
        SandboxState::Running | SandboxState::Snapshotting => Ok(()),
        state => Err(ApiError::Denied {
            state,
            detail: format!("The sandbox is {state}; only in a running one are there processes"),
        }),
    }
}

/// Sends one message; false when nobody is there any more.
async fn send(socket: &mut WebSocket, message: &impl Serialize) -> bool {
    let text = serde_json::to_string(message).unwrap_or_default();
    socket
        .send(Message::Text(Utf8Bytes::from(text)))
        .await
        .is_ok()
}

/// Ends a connection: what was sent arrives, also at a client that has to say something first.
pub(crate) async fn close(mut socket: WebSocket) {
    if socket.send(Message::Close(None)).await.is_ok() {
        let answered = async { while let Some(Ok(_)) = socket.recv().await {} };
        let _ = tokio::time::timeout(CLOSE, answered).await;
    }
}

/// The upgrade that a route asks for.
pub(crate) fn upgraded(
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<WebSocketUpgrade, ApiError> {
    let upgrade = upgrade.map_err(|rejection| ApiError::BadRequest {
        field: "upgrade".into(),
        detail: format!("must be a WebSocket's: {rejection}"),
    })?;
    Ok(upgrade.max_message_size(MAX_MESSAGE_BYTES))
}

/// Unlike all others of this host and its restarts, by the time and a count.
pub(crate) fn fresh() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{SystemTime, UNIX_EPOCH};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_micros();
    format!("{now:x}-{:x}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// What a client said.
enum Said<T> {
    Message(T),
    /// Bytes that are for the process.
    Bytes(Vec<u8>),
    /// It is no message of ours, and why.
    Nonsense(String),
    /// Nobody is there any more.
    Gone,
}

/// The next message of a client.
async fn receive<T: DeserializeOwned>(socket: &mut WebSocket) -> Said<T> {
    loop {
        let text = match socket.recv().await {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Binary(bytes))) => return Said::Bytes(bytes.into()),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Said::Gone,
        };
        return match serde_json::from_str(&text) {
            Ok(message) => Said::Message(message),
            Err(error) => Said::Nonsense(error.to_string()),
        };
    }
}

/// The first message, which can't take for ever.
async fn first<T: DeserializeOwned>(socket: &mut WebSocket) -> Said<T> {
    let first = tokio::time::timeout(FIRST_MESSAGE, receive(socket)).await;
    first.unwrap_or_else(|_| Said::Nonsense("Nothing was said in time".to_owned()))
}
