//! What one listener's API allows, and what it says about the host; known to every route.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::auth::Access;
use crate::problem::ApiError;

/// What control requests may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest body of one, in bytes.
    pub body_bytes: usize,
    /// How long such a body may take to arrive.
    pub body_time: Duration,
    /// Streams of events, commands and terminals, and requests that wait, at the same time; further
    /// ones are a 429.
    pub streams: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 1 << 20,
            body_time: Duration::from_secs(30),
            streams: 1024,
        }
    }
}

/// How a listener's API is.
#[derive(Clone, Debug)]
pub struct Options {
    /// Who may ask.
    pub access: Access,
    /// How much.
    pub limits: Limits,
    /// Where ports of sandboxes are, as `{port}-{id}.{domain}`, if anywhere.
    pub domain: Option<Arc<str>>,
}

impl From<Access> for Options {
    fn from(access: Access) -> Self {
        Self {
            access,
            limits: Limits::default(),
            domain: None,
        }
    }
}

/// The options in every request.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) limits: Limits,
    pub(crate) domain: Option<Arc<str>>,
    streams: Arc<Semaphore>,
}

impl Terms {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            limits: options.limits,
            domain: options.domain.clone(),
            streams: Arc::new(Semaphore::new(options.limits.streams)),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Terms {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let terms = parts.extensions.get::<Self>().cloned();
        Ok(terms.expect("the router gives its terms to every request"))
    }
}

/// One of the streams that may be open; held until the stream ends.
pub(crate) struct Place(#[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit);

impl<S: Send + Sync> FromRequestParts<S> for Place {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let terms = Terms::from_request_parts(parts, state).await?;
        let place = terms.streams.try_acquire_owned();
        place.map(Self).map_err(|_| ApiError::Busy {
            detail: format!(
                "{} streams and waiting requests are open at this listener of the host, which is \
                 the most; api.streams in the configuration is for more",
                terms.limits.streams
            ),
        })
    }
}
