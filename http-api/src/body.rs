//! Request bodies: JSON with a limit, and a 400 that names the field.

use axum::body::{Bytes, HttpBody as _};
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::options::{Limits, Terms};
use crate::problem::ApiError;

/// A JSON body. An empty one counts as `{}`, so that requests without a mandatory
/// field need none.
#[derive(Clone, Copy, Debug)]
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let terms = request.extensions().get::<Terms>();
        let limits = terms.map_or_else(Limits::default, |terms| terms.limits);
        // What is announced to be too long isn't waited for.
        if request.body().size_hint().lower() > limits.body_bytes as u64 {
            return Err(too_large(limits));
        }
        let arrived = timeout(limits.body_time, Bytes::from_request(request, state)).await;
        let bytes = arrived
            .map_err(|_| ApiError::Late {
                detail: format!(
                    "The body did not arrive within {:.1} s",
                    limits.body_time.as_secs_f64()
                ),
            })?
            .map_err(|rejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => too_large(limits),
                _ => ApiError::BadRequest {
                    field: "body".into(),
                    detail: rejection.body_text(),
                },
            })?;
        parse(if bytes.is_empty() { b"{}" } else { &bytes }).map(Self)
    }
}

fn too_large(limits: Limits) -> ApiError {
    let most = limits.body_bytes;
    ApiError::TooLarge {
        detail: format!("The body has more than {most} bytes, which is the most"),
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // serde takes an array for a struct, field by field in the order of our source.
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(ApiError::BadRequest {
            field: "body".into(),
            detail: "is an array; an object is needed".into(),
        });
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.inner().to_string();
        ApiError::BadRequest {
            field: field_of(&path, &inner),
            detail: inner,
        }
    })?;
    deserializer.end().map_err(|error| ApiError::BadRequest {
        field: "body".into(),
        detail: error.to_string(),
    })?;
    Ok(value)
}

/// The field an error is about: its path, or for a missing or unknown field of the
/// top level the name in serde's message.
fn field_of(path: &str, message: &str) -> String {
    let named = ["missing field `", "unknown field `"]
        .iter()
        .find_map(|lead| message.strip_prefix(lead)?.split_once('`'))
        .map(|(name, _)| name.to_owned());
    // A `?` is a key that was still being read when the text broke.
    let path = path.trim_end_matches('?').trim_end_matches('.');
    match (path, named) {
        ("", Some(name)) => name,
        ("", None) => "body".to_owned(),
        (path, Some(name)) if path != name && !path.ends_with(&format!(".{name}")) => {
            format!("{path}.{name}")
        }
        (path, _) => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::CreateSandbox;

    fn field(body: &str) -> String {
        match parse::<CreateSandbox>(body.as_bytes()) {
            Err(ApiError::BadRequest { field, .. }) => field,
            other => panic!("expected a 400, got {other:?}"),
        }
    }

    #[test]
    fn a_bad_body_names_its_field() {
        assert_eq!(field(r#"{"#), "body");
        assert_eq!(field(r#"{}"#), "template");
        assert_eq!(field(r#"{"template":"base","vcpu":1}"#), "vcpu");
        assert_eq!(field(r#"{"template":"base","vcpus":"two"}"#), "vcpus");
        assert_eq!(field(r#"{"template":"base","id":"Not OK"}"#), "id");
        assert_eq!(field(r#"{"template":"../etc"}"#), "template");
        assert_eq!(field(r#"{"template":"base","env":{"A":1}}"#), "env.A");
        assert_eq!(field(r#"{"template":"base"} x"#), "body");
    }
}
