//! Errors as these clients read them: `{"error": {"code", "message"}}`.

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::body::JsonBody;
use crate::ids::SandboxId;
use crate::problem::ApiError;
use crate::routes::{Segment, unreadable};

pub(super) use crate::problem::bad;

/// An error on its way to such a client.
pub(crate) struct Refusal(pub(crate) ApiError);

#[derive(Serialize)]
struct Document {
    error: Inner,
}

#[derive(Serialize)]
struct Inner {
    code: &'static str,
    message: String,
    request_id: String,
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

/// The words that these clients tell errors apart by.
fn code(error: &ApiError) -> &'static str {
    match error {
        ApiError::BadRequest { .. }
        | ApiError::Late { .. }
        | ApiError::TooLarge { .. }
        | ApiError::HeadTooLarge { .. } => "invalid_request",
        ApiError::Unauthorized { .. } => "unauthorized",
        ApiError::Forbidden { .. } => "forbidden",
        ApiError::NotFound { .. } => "not_found",
        ApiError::Denied { .. } | ApiError::OtherRun { .. } => "invalid_state",
        ApiError::Exists { .. } | ApiError::Incompatible { .. } => "conflict",
        ApiError::Busy { .. } | ApiError::Full { .. } | ApiError::Unavailable { .. } => {
            "host_unavailable"
        }
        ApiError::Failed {
            code: "guest_failed",
            ..
        } => "agent_error",
        ApiError::Failed { .. } | ApiError::Corrupt { .. } => "internal_error",
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let problem = self.0.problem();
        let error = Inner {
            code: code(&self.0),
            message: problem.detail,
            request_id: problem.request_id,
        };
        self.0.answer(Json(Document { error }))
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
        sandbox(text).map(Self)
    }
}

/// A sandbox and one of its processes.
pub(super) struct IdAndPid(pub(super) SandboxId, pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for IdAndPid {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = Path::<(String, String)>::from_request_parts(parts, state).await;
        let Path((id, pid)) = path.map_err(|rejection| unreadable(&rejection))?;
        Ok(Self(sandbox(id)?, pid))
    }
}

fn sandbox(text: String) -> Result<SandboxId, Refusal> {
    text.parse().map_err(|_| {
        let what = "capsule";
        ApiError::NotFound { what, name: text }.into()
    })
}
