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
/// `POST`, optional `?timeout_ms=`: 204 once all processes that clients have started stand still;
/// they go on by themselves after that time. For the host only.
pub const FREEZE_PATH: &str = "/snapshot/freeze";
/// `POST`: 204 once they go on. For the host only.
pub const THAW_PATH: &str = "/snapshot/thaw";
/// `POST` begins to read all memory once, `GET` tells `{state, pages, bytes, totalBytes}`, `DELETE`
/// ends it. For the host only.
pub const PRELOAD_PATH: &str = "/memory/preload";
/// `GET`: `{"ports":[{"port", "loopback"}]}`, what the guest's processes listen on. For the host only.
pub const PORTS_PATH: &str = "/ports";
/// `GET`: the same as a line of JSON now and at every change. For the host only.
pub const PORT_EVENTS_PATH: &str = "/ports/events";
/// `GET` and `POST` files.
pub const FILES_PATH: &str = "/files";
/// `POST`: several files become one.
pub const COMPOSE_PATH: &str = "/files/compose";
/// `GET`: how busy and how full the guest is.
pub const METRICS_PATH: &str = "/metrics";
/// `GET`: the environment that [`InitRequest::env_vars`] set.
pub const ENVIRONMENT_PATH: &str = "/envs";
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

/// Whether a path is for the host only: whoever passes sandbox traffic on must refuse it.
///
/// ```
/// use envd::protocol::is_host_only;
///
/// assert!(is_host_only("/init") && is_host_only("/snapshot/prepare"));
/// assert!(is_host_only("/snapshot/anything/later") && is_host_only("//init/"));
/// assert!(!is_host_only("/health") && !is_host_only("/files"));
/// ```
pub fn is_host_only(path: &str) -> bool {
    // By its first component, so that a route added below is covered.
    let first = path.split('/').find(|component| !component.is_empty());
    matches!(first, Some("init" | "snapshot" | "memory" | "ports"))
}

/// Body of every failed plain HTTP request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The HTTP status again.
    pub code: u16,
    /// What was wrong, naming the field where one was.
    pub message: String,
}
