//! Errors as these clients read them: `{code, message, error_code?}`.

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::body::JsonBody;
use crate::ids::SandboxId;
use crate::problem::ApiError;
use crate::routes::Segment;

pub(super) use crate::problem::bad;

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
        self.0.answer(Json(document))
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

/// Something else of a request that is refused in these clients' words.
pub(super) struct Part<T>(pub(super) T);

impl<T, S> FromRequestParts<S> for Part<T>
where
    T: FromRequestParts<S, Rejection = ApiError>,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        Ok(Self(T::from_request_parts(parts, state).await?))
    }
}

/// The sandbox that a path names. A name that no sandbox can have is that of none.
pub(super) struct Id(pub(super) SandboxId);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Segment(text) = Segment::from_request_parts(parts, state).await?;
        text.parse()
            .map(Self)
            .map_err(|_| super::not_found(&text).into())
    }
}
