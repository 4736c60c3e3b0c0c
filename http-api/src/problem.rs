//! Errors on the wire: RFC 9457 problem documents.
//!
//! Three families, told apart by status: *denied* (409: the state forbids it), *not
//! found* (404), *failed* (5xx, with its causes). `code` is stable and for programs,
//! `detail` is for people and says what to do.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::context;
use crate::wire::SandboxState;

/// Why a request was not met; one variant per thing a caller can do about it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ApiError {
    /// The request itself is wrong. 400.
    #[error("{field}: {detail}")]
    BadRequest {
        /// The offending field or parameter, as the caller wrote it.
        field: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The request took too long to arrive. 408.
    #[error("{detail}")]
    Late {
        /// What did.
        detail: String,
    },
    /// The body is longer than allowed. 413.
    #[error("{detail}")]
    TooLarge {
        /// How long it may be.
        detail: String,
    },
    /// The head is longer than allowed. 431.
    #[error("{detail}")]
    HeadTooLarge {
        /// How long it may be.
        detail: String,
    },
    /// No token, or one that nobody knows. 401.
    #[error("{detail}")]
    Unauthorized {
        /// What is missing, and where to get it.
        detail: String,
    },
    /// Who asks is known and may not. 403.
    #[error("{detail}")]
    Forbidden {
        /// Why not.
        detail: String,
    },
    /// No such sandbox, template or route. 404.
    #[error("There is no {what} {name:?}")]
    NotFound {
        /// What was looked for.
        what: &'static str,
        /// Under which name.
        name: String,
    },
    /// The sandbox's state forbids it. 409.
    #[error("{detail}")]
    Denied {
        /// The state it is in.
        state: SandboxState,
        /// What was asked and why it can't be.
        detail: String,
    },
    /// The sandbox is in another run than the one that was meant. 412.
    #[error("Sandbox {id:?} is in another run than the one that was meant; look at it again")]
    OtherRun {
        /// Which.
        id: String,
        /// Its newest run; none if it has never run.
        execution_id: Option<String>,
    },
    /// The name is taken by something else. 409.
    #[error("{what} {name:?} exists already")]
    Exists {
        /// What there is.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// This host is not like the one that made it; nothing was changed, another host may do. 409.
    #[error("{detail}")]
    Incompatible {
        /// What differs.
        detail: String,
    },
    /// Stored data is damaged; nothing was changed. 422.
    #[error("{detail}")]
    Corrupt {
        /// File, offset, expected and found.
        detail: String,
    },
    /// Too much at once; the same request may succeed soon. 429.
    #[error("{detail}")]
    Busy {
        /// What is at its limit.
        detail: String,
    },
    /// The host has no room for it. 507.
    #[error("{detail}")]
    Full {
        /// What has run out.
        detail: String,
    },
    /// Something failed. 500.
    #[error("{detail}")]
    Failed {
        /// A stable word for what failed.
        code: &'static str,
        /// What failed, with its causes, and what became of the sandbox.
        detail: String,
    },
    /// The daemon is not up to it now (starting, draining, engine lost). 503.
    #[error("{detail}")]
    Unavailable {
        /// What is missing.
        detail: String,
    },
}

impl ApiError {
    /// A failure with all its causes in one line.
    #[must_use]
    pub fn failed(code: &'static str, error: &dyn std::error::Error) -> Self {
        let mut detail = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            detail.push_str(": ");
            detail.push_str(&error.to_string());
            cause = error.source();
        }
        Self::Failed { code, detail }
    }

    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest { .. } => StatusCode::BAD_REQUEST,
            Self::Late { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::HeadTooLarge { .. } => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Unauthorized { .. } => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::NotFound { .. } => StatusCode::NOT_FOUND,
            Self::Denied { .. } | Self::Exists { .. } | Self::Incompatible { .. } => {
                StatusCode::CONFLICT
            }
            Self::OtherRun { .. } => StatusCode::PRECONDITION_FAILED,
            Self::Corrupt { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Busy { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Full { .. } => StatusCode::INSUFFICIENT_STORAGE,
            Self::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The stable word for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadRequest { .. } => "bad_request",
            Self::Late { .. } => "request_timeout",
            Self::TooLarge { .. } => "body_too_large",
            Self::HeadTooLarge { .. } => "head_too_large",
            Self::Unauthorized { .. } => "unauthorized",
            Self::Forbidden { .. } => "forbidden",
            Self::NotFound { .. } => "not_found",
            Self::Denied { .. } => "wrong_state",
            Self::Exists { .. } => "exists",
            Self::OtherRun { .. } => "other_run",
            Self::Incompatible { .. } => "incompatible_host",
            Self::Corrupt { .. } => "corrupt",
            Self::Busy { .. } => "busy",
            Self::Full { .. } => "capacity_exhausted",
            Self::Failed { code, .. } => code,
            Self::Unavailable { .. } => "unavailable",
        }
    }

    fn is_retryable(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::Unavailable { .. })
    }

    /// The answer with this body, and what all refusals have beside it, whoever reads them.
    pub(crate) fn answer(&self, body: impl IntoResponse) -> Response {
        let mut response = (self.status(), body).into_response();
        if self.is_retryable() {
            let soon = HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, soon);
        }
        response
    }

    /// The document that is sent.
    #[must_use]
    pub fn problem(&self) -> Problem {
        let status = self.status();
        if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE {
            // The span around it has the request's id.
            tracing::error!(code = self.code(), detail = %self, "A request failed");
        }
        let (field, state) = match self {
            Self::BadRequest { field, .. } => (Some(field.clone()), None),
            Self::Denied { state, .. } => (None, Some(*state)),
            _ => (None, None),
        };
        let context = context::current();
        let request_id = context.as_ref().map(|found| found.request_id().to_owned());
        Problem {
            title: status.canonical_reason().unwrap_or("Error").to_owned(),
            status: status.as_u16(),
            detail: self.to_string(),
            code: self.code().to_owned(),
            retryable: self.is_retryable(),
            request_id: request_id.unwrap_or_else(context::next_request_id),
            trace_id: context.as_ref().and_then(context::Context::trace_id),
            field,
            state,
            execution_id: match self {
                Self::OtherRun { execution_id, .. } => execution_id.clone(),
                _ => None,
            },
        }
    }
}

/// A 400.
pub(crate) fn bad(field: impl Into<String>, detail: impl Into<String>) -> ApiError {
    ApiError::BadRequest {
        field: field.into(),
        detail: detail.into(),
    }
}

/// A problem document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// The status in words.
    pub title: String,
    /// The HTTP status again.
    pub status: u16,
    /// For people: what is wrong and what to do.
    pub detail: String,
    /// For programs: stable.
    pub code: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// Found again in the daemon's log, if the failure is the host's.
    pub request_id: String,
    /// The trace of the request's `traceparent`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// The offending field of a 400.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The sandbox's state of a 409.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<SandboxState>,
    /// The sandbox's newest run, of a 412.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<String>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let problem = self.problem();
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = self.answer(body);
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        response
    }
}
