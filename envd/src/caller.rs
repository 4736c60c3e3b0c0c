//! What the headers of a Connect call say about its caller: as whom, and how patient.

use std::future::Future;
use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use connectrpc::{ConnectError, RequestContext};
use tokio::time::Instant;

use crate::protocol::KEEPALIVE_HEADER;

/// Longest interval between keep-alives, in seconds.
const MAX_KEEP_ALIVE_SECONDS: u64 = 3600;

/// The user of `Authorization: Basic base64("user:")`; other schemes name none.
pub(crate) fn user(context: &RequestContext) -> Result<Option<String>, ConnectError> {
    let Some(value) = context.header("authorization") else {
        return Ok(None);
    };
    user_of(value.to_str().unwrap_or_default())
        .map_err(|()| ConnectError::unauthenticated("Malformed Authorization header"))
}

fn user_of(header: &str) -> Result<Option<String>, ()> {
    let Some((scheme, encoded)) = header.split_once(' ') else {
        return Ok(None);
    };
    if !scheme.eq_ignore_ascii_case("basic") {
        return Ok(None);
    }
    let decoded = STANDARD.decode(encoded.trim()).map_err(|_| ())?;
    let credentials = String::from_utf8(decoded).map_err(|_| ())?;
    let name = credentials.split(':').next().unwrap_or_default();
    Ok(Some(name.to_owned()).filter(|name| !name.is_empty()))
}

/// The silence after which the caller wants a sign of life.
pub(crate) fn keep_alive(context: &RequestContext) -> Option<Duration> {
    let header = context.header(KEEPALIVE_HEADER)?;
    let seconds: u64 = header.to_str().ok()?.parse().ok()?;
    (1..=MAX_KEEP_ALIVE_SECONDS)
        .contains(&seconds)
        .then(|| Duration::from_secs(seconds))
}

/// Ends a call at its caller's deadline, if it has one.
pub(crate) async fn in_time<T>(
    context: &RequestContext,
    call: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    let Some(deadline) = context.deadline().map(Instant::from_std) else {
        return call.await;
    };
    tokio::time::timeout_at(deadline, call)
        .await
        .unwrap_or_else(|_| Err(too_late()))
}

/// The error of a deadline.
pub(crate) fn too_late() -> ConnectError {
    ConnectError::deadline_exceeded("The deadline of the call has passed")
}

/// Resolves at an instant; never, for no instant.
pub(crate) async fn reached(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_credentials_name_a_user_and_others_nobody() {
        assert_eq!(user_of("Basic dXNlcjo="), Ok(Some("user".to_owned())));
        assert_eq!(
            user_of("basic dXNlcjpzZWNyZXQ="),
            Ok(Some("user".to_owned()))
        );
        assert_eq!(user_of("Basic Og=="), Ok(None), "an empty name");
        assert_eq!(user_of("Bearer x"), Ok(None));
        assert_eq!(user_of("Basic ???"), Err(()));
    }
}
