//! What the host and the guest agree on: paths, headers, JSON shapes and the Connect framing.
//!
//! Everything is plain data with serde; nothing here opens a socket. The shapes are those of the
//! E2B clients, so a client of theirs and our own daemon speak to the same `envd`.

pub mod envelope;
mod init;
pub mod network;
mod process;
mod timestamp;

pub use init::{Health, InitRequest};
pub use process::{
    EndEvent, KeepAlive, Output, ProcessConfig, ProcessEvent, ProcessSelector, SendSignalRequest,
    StartEvent, StartRequest, StreamMessage,
};
pub use timestamp::{Timestamp, TimestampError};

use serde::{Deserialize, Serialize};

/// TCP port in the guest. Source: E2B's clients.
pub const PORT: u16 = 49983;

/// The version that gates features in E2B's clients; ours is the crate's own.
pub const COMPAT_VERSION: &str = "0.6.4";

/// `GET`: [`Health`]; needs no token.
pub const HEALTH_PATH: &str = "/health";
/// `POST` [`InitRequest`]: 204. For the host only.
pub const INIT_PATH: &str = "/init";
/// `POST`, optional `?timeout_ms=`: 204 once the guest is ready for a snapshot. For the host only.
pub const PREPARE_PATH: &str = "/snapshot/prepare";
/// Connect, server stream: [`StartRequest`] to [`StreamMessage`]s.
pub const START_PATH: &str = "/process.Process/Start";
/// Connect, server stream: `{"process": `[`ProcessSelector`]`}` to [`StreamMessage`]s.
pub const CONNECT_PATH: &str = "/process.Process/Connect";
/// Connect, unary: [`SendSignalRequest`] to `{}`.
pub const SEND_SIGNAL_PATH: &str = "/process.Process/SendSignal";

/// Header with the access token that [`InitRequest::access_token`] set.
pub const ACCESS_TOKEN_HEADER: &str = "x-access-token";
/// Header with the deadline of a call in milliseconds; on Start, the process group is killed then.
pub const TIMEOUT_HEADER: &str = "connect-timeout-ms";
/// Header with the seconds of silence after which a stream carries a keep-alive event.
pub const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
/// Content type of a Connect stream in JSON.
pub const STREAM_CONTENT_TYPE: &str = "application/connect+json";
/// How long `/snapshot/prepare` may take unless the request says otherwise, in milliseconds.
pub const PREPARE_TIMEOUT_MS: u64 = 2000;

/// Body of every failed plain HTTP request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The HTTP status again.
    pub code: u16,
    /// What was wrong, naming the field where one was.
    pub message: String,
}
