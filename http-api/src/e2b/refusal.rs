//! Errors as these clients read them: `{code, message, error_code?}`.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::body::JsonBody;
use crate::ids::SandboxId;
use crate::options::Terms;
use crate::problem::ApiError;

/// An error on its way to such a client.
pub(crate) struct Refusal(pub(crate) ApiError);

#[derive(Serialize)]
struct Document {
    code: u16,
    message: String,
    error_code: String,
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let problem = self.0.problem();
        let document = Document {
            code: problem.status,
            message: problem.detail,
            error_code: problem.code,
        };
        let mut response = (self.0.status(), Json(document)).into_response();
        if problem.retryable {
            let soon = HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, soon);
        }
        response
    }
}

/// A 400.
pub(super) fn bad(field: impl Into<String>, detail: impl Into<String>) -> ApiError {
    ApiError::BadRequest {
        field: field.into(),
        detail: detail.into(),
    }
}

/// A JSON body; an empty one is `{}`.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let JsonBody(value) = JsonBody::from_request(request, state).await?;
        Ok(Self(value))
    }
}

/// The one variable part of a path.
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = Path::from_request_parts(parts, state).await;
        path.map(|Path(text)| Self(text))
            .map_err(|rejection: PathRejection| bad("path", rejection.body_text()).into())
    }
}

/// What the listener says of itself.
pub(super) struct Said(pub(super) Terms);

impl<S: Send + Sync> FromRequestParts<S> for Said {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        Ok(Self(Terms::from_request_parts(parts, state).await?))
    }
}

/// The sandbox that a path names. A name that no sandbox can have is that of none.
pub(super) struct Id(pub(super) SandboxId);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Name(text) = Name::from_request_parts(parts, state).await?;
        text.parse()
            .map(Self)
            .map_err(|_| super::not_found(&text).into())
    }
}
