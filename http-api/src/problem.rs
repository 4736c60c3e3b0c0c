//! Errors on the wire: RFC 9457 problem documents.
//!
//! Three families, told apart by status: *denied* (409: the state forbids it), *not
//! found* (404), *failed* (5xx, with its causes). `code` is stable and for programs,
//! `detail` is for people and says what to do.

use std::sync::atomic::{AtomicU64, Ordering};

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

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
            Self::Unauthorized { .. } => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::NotFound { .. } => StatusCode::NOT_FOUND,
            Self::Denied { .. } | Self::Exists { .. } | Self::Incompatible { .. } => {
                StatusCode::CONFLICT
            }
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
            Self::Unauthorized { .. } => "unauthorized",
            Self::Forbidden { .. } => "forbidden",
            Self::NotFound { .. } => "not_found",
            Self::Denied { .. } => "wrong_state",
            Self::Exists { .. } => "exists",
            Self::Incompatible { .. } => "incompatible_host",
            Self::Corrupt { .. } => "corrupt",
            Self::Busy { .. } => "busy",
            Self::Full { .. } => "capacity_exhausted",
            Self::Failed { code, .. } => code,
            Self::Unavailable { .. } => "unavailable",
        }
    }

    /// The document that is sent.
    #[must_use]
    pub fn problem(&self) -> Problem {
        let status = self.status();
        let (field, state) = match self {
            Self::BadRequest { field, .. } => (Some(field.clone()), None),
            Self::Denied { state, .. } => (None, Some(*state)),
            _ => (None, None),
        };
        Problem {
            title: status.canonical_reason().unwrap_or("Error").to_owned(),
            status: status.as_u16(),
            detail: self.to_string(),
            code: self.code().to_owned(),
            retryable: matches!(self, Self::Busy { .. } | Self::Unavailable { .. }),
            request_id: next_request_id(),
            field,
            state,
        }
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
    /// Found again in the daemon's log.
    pub request_id: String,
    /// The offending field of a 400.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The sandbox's state of a 409.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<SandboxState>,
}

/// Unique while the process lives; restarts are told apart by the log's time.
fn next_request_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("req-{:08x}", NEXT.fetch_add(1, Ordering::Relaxed))
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let problem = self.problem();
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = (self.status(), body).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if problem.retryable {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
