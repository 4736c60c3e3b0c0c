//! Handlers: each turns a request into one call of the control plane.

pub(crate) mod events;
pub(crate) mod health;
pub(crate) mod inside;
mod listing;
pub(crate) mod sandboxes;
pub(crate) mod snapshots;

use std::fmt::Display;
use std::str::FromStr;

use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, Path, Query};
use axum::http::request::Parts;
use serde::Deserialize;

use crate::control_plane::Aim;
use crate::problem::{ApiError, bad};

/// The one variable part of a route's path; a 400 when its bytes are no text.
pub(crate) struct Segment(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::from_request_parts(parts, state).await;
        path.map(|Path(text)| Self(text))
            .map_err(|rejection| unreadable(&rejection))
    }
}

/// What is said of a path whose bytes are no text.
pub(crate) fn unreadable(rejection: &PathRejection) -> ApiError {
    bad("path", rejection.body_text())
}

/// The sandbox of a path, in the run that `?execution_id=` names if there is that.
pub(crate) struct Aimed(pub(crate) Aim);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    execution_id: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for Aimed {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Segment(id) = Segment::from_request_parts(parts, state).await?;
        let id = name("id", &id)?;
        let query = Query::<Run>::from_request_parts(parts, state).await;
        let Query(Run { execution_id }) =
            query.map_err(|rejection| bad("query", rejection.body_text()))?;
        Ok(Self(Aim { id, execution_id }))
    }
}

/// A name from the path, or a 400 that says which part is wrong.
pub(crate) fn name<T>(field: &'static str, text: &str) -> Result<T, ApiError>
where
    T: FromStr,
    T::Err: Display,
{
    text.parse()
        .map_err(|error: T::Err| bad(field, error.to_string()))
}
