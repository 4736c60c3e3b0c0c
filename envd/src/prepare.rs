//! `POST /snapshot/prepare`: makes the guest small and quiet, and lets connections go.
//!
//! Writing back and dropping clean page cache have to succeed. What follows makes the snapshot
//! smaller still, and isn't begun when half of the time is gone: discarding free blocks of the
//! disk, moving used pages together, and waiting until nothing runs. Nothing of it has to be undone
//! by a host that changes its mind; processes go on all the while.
//!
//! Idle connections are closed after their next response, because the peer of a connection that is
//! frozen into a snapshot is gone when the guest wakes. The work runs on a thread of its own and
//! may go on after the time is up: the host decides whether to pause all the same.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use serde_json::Value;
use tokio::time::Instant;

use crate::files::request::parameter;
use crate::protocol::PREPARE_TIMEOUT_MS;
use crate::refusal::Refusal;
use crate::routes::Guest;

/// Longest time that a request may ask for.
const MAX_TIMEOUT_MS: u64 = 60_000;

/// The route.
pub(crate) async fn prepare(
    State(guest): State<Arc<Guest>>,
    RawQuery(query): RawQuery,
    body: Bytes,
) -> Result<StatusCode, Refusal> {
    let timeout = timeout(query.as_deref(), &body, PREPARE_TIMEOUT_MS)?;
    let machine = guest.machine;
    let (until, extras_until) = (Instant::now() + timeout, Instant::now() + timeout / 2);
    let flush = tokio::task::spawn_blocking(move || machine.flush());
    match tokio::time::timeout_at(until, flush).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => return Err(Refusal::failed("Dropping the page cache", &error)),
        Ok(Err(error)) => {
            return Err(Refusal::failed("Flushing", &std::io::Error::other(error)));
        }
        Err(_) => {
            let timeout_ms = timeout.as_millis();
            let message = format!("Flushing took longer than {timeout_ms} ms and still goes on");
            return Err(Refusal {
                status: StatusCode::GATEWAY_TIMEOUT,
                message,
            });
        }
    }
    let compact = tokio::task::spawn_blocking(move || machine.compact(extras_until.into_std()));
    // One that takes longer goes on while the guest is paused, and after.
    let _ = tokio::time::timeout_at(until, compact).await;
    guest.connections.let_go();
    Ok(StatusCode::NO_CONTENT)
}

/// `?timeout_ms=N`, else `{"timeout_ms": N}`, else the default.
pub(crate) fn timeout(
    query: Option<&str>,
    body: &[u8],
    usual_ms: u64,
) -> Result<Duration, Refusal> {
    let bad = || Refusal::bad_request(format!("Field timeout_ms: must be 1 to {MAX_TIMEOUT_MS}"));
    let asked = match parameter(query, "timeout_ms") {
        Some(text) => Some(text.parse().map_err(|_| bad())?),
        None if body.is_empty() => None,
        None => {
            let body: Value = serde_json::from_slice(body)
                .map_err(|e| Refusal::bad_request(format!("The body is not JSON: {e}")))?;
            match body.get("timeout_ms") {
                None | Some(Value::Null) => None,
                Some(value) => Some(value.as_u64().ok_or_else(bad)?),
            }
        }
    };
    let timeout_ms = asked.unwrap_or(usual_ms);
    if (1..=MAX_TIMEOUT_MS).contains(&timeout_ms) {
        Ok(Duration::from_millis(timeout_ms))
    } else {
        Err(bad())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeout_comes_from_the_query_then_the_body_then_the_default() {
        let millis = |query, body| timeout(query, body, 2000).map(|t| t.as_millis());
        assert_eq!(millis(None, b"").unwrap(), 2000);
        assert_eq!(millis(Some("a=b&timeout_ms=5"), b"{}").unwrap(), 5);
        assert_eq!(millis(None, br#"{"timeout_ms": 7}"#).unwrap(), 7);
        for (query, body) in [
            (Some("timeout_ms=x"), &b""[..]),
            (Some("timeout_ms=0"), b""),
            (None, br#"{"timeout_ms":"7"}"#),
            (None, br#"{"timeout_ms":60001}"#),
        ] {
            assert!(
                millis(query, body)
                    .unwrap_err()
                    .message
                    .contains("timeout_ms")
            );
        }
        assert!(timeout(None, b"{", 1).is_err());
    }
}
