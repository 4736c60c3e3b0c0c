//! What the proxy itself answers. The texts of the 502s are E2B's: its clients look for them.

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::target::{NoTarget, Target};
use crate::problem::ApiError;

/// Why a request was not passed on.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    status: StatusCode,
    body: Body,
}

#[derive(Clone, Debug, Serialize)]
struct Body {
    #[serde(rename = "sandboxId", skip_serializing_if = "Option::is_none")]
    sandbox: Option<String>,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    code: u16,
}

impl Answer {
    fn new(status: StatusCode, sandbox: Option<String>, message: impl Into<String>) -> Self {
        let body = Body {
            sandbox,
            message: message.into(),
            port: None,
            code: status.as_u16(),
        };
        Self { status, body }
    }

    /// There are as many requests as there may be.
    pub(super) fn busy() -> Self {
        let message = "The host passes on as many requests as it may; try again";
        Self::new(StatusCode::TOO_MANY_REQUESTS, None, message)
    }

    /// There is none, or none that runs.
    pub(super) fn not_found(id: &str) -> Self {
        let message = "The sandbox was not found";
        Self::new(StatusCode::BAD_GATEWAY, Some(id.to_owned()), message)
    }

    /// Nobody listens there.
    pub(super) fn closed_port(target: &Target) -> Self {
        let id = Some(target.id.to_string());
        let message = "The sandbox is running but port is not open";
        let mut answer = Self::new(StatusCode::BAD_GATEWAY, id, message);
        answer.body.port = Some(target.port);
        answer
    }

    /// It runs and does not answer as HTTP does.
    pub(super) fn broken(target: &Target, what: &str) -> Self {
        let message = format!("The sandbox is running but port {} {what}", target.port);
        Self::new(
            StatusCode::BAD_GATEWAY,
            Some(target.id.to_string()),
            message,
        )
    }

    /// It took the request and did not begin to answer.
    pub(super) fn silent(target: &Target, seconds: u64) -> Self {
        let message = format!(
            "Port {} of the sandbox did not begin to answer within {seconds} s",
            target.port
        );
        Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            Some(target.id.to_string()),
            message,
        )
    }

    /// The route is there, for the host alone.
    pub(super) fn host_only(path: &str) -> Self {
        let message = format!("{path} is for the sandbox's host alone and is not passed on");
        Self::new(StatusCode::NOT_FOUND, None, message)
    }

    /// There is no way to it now.
    pub(super) fn no_way(target: &Target, error: &ApiError) -> Self {
        match error {
            ApiError::NotFound { .. } | ApiError::Denied { .. } => {
                Self::not_found(target.id.as_str())
            }
            error => Self::new(
                error.status(),
                Some(target.id.to_string()),
                error.to_string(),
            ),
        }
    }

    /// As a response.
    pub(super) fn into_response(self) -> Response {
        let mut headers = HeaderMap::new();
        let json = HeaderValue::from_static("application/json");
        headers.insert(header::CONTENT_TYPE, json);
        if matches!(self.status.as_u16(), 429 | 503) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        let body = serde_json::to_vec(&self.body).unwrap_or_default();
        (self.status, headers, body).into_response()
    }
}

impl From<NoTarget> for Answer {
    fn from(error: NoTarget) -> Self {
        match error {
            NoTarget::Malformed(message) => Self::new(StatusCode::BAD_REQUEST, None, message),
            NoTarget::Unknown(id) => Self::not_found(&id),
        }
    }
}
