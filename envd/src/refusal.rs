//! The one error body of the plain HTTP routes: a status and a message, `{code, message}` in JSON.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::protocol::ErrorBody;

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
}

impl Refusal {
    /// The request itself is wrong: 400.
    pub(crate) fn bad_request(message: impl Into<String>) -> Refusal {
        Refusal {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
        }
    }

    /// The machine would not do it: 500.
    pub(crate) fn failed(operation: &str, error: &std::io::Error) -> Refusal {
        let message = format!("{operation}: {error}");
        Refusal {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            message,
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = ErrorBody {
            code: self.status.as_u16(),
            message: self.message,
        };
        json(self.status, &body)
    }
}

/// A JSON response.
pub(crate) fn json(status: StatusCode, body: &impl serde::Serialize) -> Response {
    let text = serde_json::to_vec(body).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}
