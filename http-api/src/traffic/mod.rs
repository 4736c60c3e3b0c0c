//! Traffic for what runs inside sandboxes: a reverse proxy that knows one thing about a request,
//! which port of which sandbox it is for.
//!
//! ```text
//!   request ─▶ target (headers, or the host's first label) ─▶ Traffic::way ─▶ address
//!                                                                                │
//!   client ◀── bytes as they come, either way, until one side ends ──▶ forward ──┘
//! ```
//!
//! Nothing is buffered: a frame is read from one side when the other has taken the one before.
//! Every request has its own connection to the guest. A pooled one might lead to whoever got the
//! address next, or to a guest that was paused and brought back meanwhile.
//!
//! Source of headers, host labels and answers: E2B's clients, and what its own proxy answers.

mod answer;
mod forward;
mod guarded;
mod headers;
mod target;

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use tokio::sync::Semaphore;

use crate::ids::SandboxId;
use crate::problem::ApiError;

/// The way to a running guest.
pub struct Way {
    /// Where its ports are.
    pub address: IpAddr,
    /// Ready when the guest that was meant no longer runs.
    pub left: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// Whoever knows where sandboxes are.
pub trait Traffic: Clone + Send + Sync + 'static {
    /// The way to a sandbox. One that is paused and is to be resumed by traffic runs when this
    /// returns.
    fn way(&self, id: SandboxId) -> impl Future<Output = Result<Way, ApiError>> + Send;

    /// Whether a path on a port of every guest is for the host alone. The path has no escapes.
    fn is_host_only(&self, port: u16, path: &str) -> bool;
}

/// The sandbox listener: every request is for a sandbox. At most `streams` of them are under way at
/// the same time, upgraded connections included; further ones are a 429.
pub fn traffic<T: Traffic>(traffic: T, streams: usize) -> Router {
    let places = Arc::new(Semaphore::new(streams));
    Router::new()
        .fallback(pass::<T>)
        .with_state((traffic, places))
}

async fn pass<T: Traffic>(
    State((traffic, places)): State<(T, Arc<Semaphore>)>,
    request: Request,
) -> Response {
    let Ok(place) = places.try_acquire_owned() else {
        return answer::Answer::busy().into_response();
    };
    match forward::forward(&traffic, request, place).await {
        Ok(response) => response,
        Err(answer) => answer.into_response(),
    }
}
