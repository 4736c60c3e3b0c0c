//! `POST /snapshot/prepare`: writes back, drops clean page cache, lets connections go.
//!
//! Idle connections are closed after their next response, because the peer of a connection that is
//! frozen into a snapshot is gone when the guest wakes. The flush runs on a thread of its own and
//! may go on after the time is up: the host decides whether to pause all the same.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use serde_json::Value;

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
    let timeout_ms = timeout_ms(query.as_deref(), &body)?;
    let machine = guest.machine;
    let flush = tokio::task::spawn_blocking(move || machine.flush());
    match tokio::time::timeout(Duration::from_millis(timeout_ms), flush).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => return Err(Refusal::failed("Dropping the page cache", &error)),
        Ok(Err(error)) => {
            return Err(Refusal::failed("Flushing", &std::io::Error::other(error)));
        }
        Err(_) => {
            let message = format!("Flushing took longer than {timeout_ms} ms and still goes on");
            return Err(Refusal {
                status: StatusCode::GATEWAY_TIMEOUT,
                message,
            });
        }
    }
    guest.connections.let_go();
    Ok(StatusCode::NO_CONTENT)
}

/// `?timeout_ms=N`, else `{"timeout_ms": N}`, else the default.
fn timeout_ms(query: Option<&str>, body: &[u8]) -> Result<u64, Refusal> {
    let bad = || Refusal::bad_request(format!("Field timeout_ms: must be 1 to {MAX_TIMEOUT_MS}"));
    let in_query = query
        .into_iter()
        .flat_map(|q| q.split('&'))
        .find_map(|p| p.strip_prefix("timeout_ms="));
    let asked = match in_query {
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
    let timeout = asked.unwrap_or(PREPARE_TIMEOUT_MS);
    if (1..=MAX_TIMEOUT_MS).contains(&timeout) {
        Ok(timeout)
    } else {
        Err(bad())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeout_comes_from_the_query_then_the_body_then_the_default() {
        assert_eq!(timeout_ms(None, b"").unwrap(), PREPARE_TIMEOUT_MS);
        assert_eq!(timeout_ms(Some("a=b&timeout_ms=5"), b"{}").unwrap(), 5);
        assert_eq!(timeout_ms(None, br#"{"timeout_ms": 7}"#).unwrap(), 7);
        for (query, body) in [
            (Some("timeout_ms=x"), &b""[..]),
            (Some("timeout_ms=0"), b""),
            (None, br#"{"timeout_ms":"7"}"#),
            (None, br#"{"timeout_ms":60001}"#),
        ] {
            assert!(
                timeout_ms(query, body)
                    .unwrap_err()
                    .message
                    .contains("timeout_ms")
            );
        }
        assert!(timeout_ms(None, b"{").is_err());
    }
}
