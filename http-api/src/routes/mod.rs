//! Handlers: each turns a request into one call of the control plane.

pub(crate) mod health;
pub(crate) mod sandboxes;
pub(crate) mod snapshots;

use std::fmt::Display;
use std::str::FromStr;

use crate::problem::ApiError;

/// A name from the path, or a 400 that says which part is wrong.
fn name<T>(field: &'static str, text: &str) -> Result<T, ApiError>
where
    T: FromStr,
    T::Err: Display,
{
    text.parse().map_err(|error: T::Err| ApiError::BadRequest {
        field: field.to_owned(),
        detail: error.to_string(),
    })
}
