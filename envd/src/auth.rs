//! The one gate before every route: once a token is set, all but `/health` ask for it.
//!
//! A signed URL of `/files` stands for the token as far as its one file goes.
//!
//! It wraps the whole router, the fallback included, so a route that is added later is behind it.
//! A Connect call gets a Connect error, everything else the plain `{code, message}`.

use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use crate::files::signature::{self, Operation};
use crate::protocol::envelope::CallError;
use crate::protocol::{ACCESS_TOKEN_HEADER, FILES_PATH, HEALTH_PATH};
use crate::refusal::{Refusal, json};
use crate::routes::{Guest, is_rpc};

/// Lets a request pass, or answers 401.
pub(crate) async fn require_token(
    State(guest): State<Arc<Guest>>,
    request: Request,
    next: Next,
) -> Response {
    let presented = request
        .headers()
        .get(ACCESS_TOKEN_HEADER)
        .map(HeaderValue::as_bytes);
    let admitted = request.uri().path() == HEALTH_PATH
        || guest.settings.admits(presented)
        || is_signed(&guest, &request);
    if admitted {
        return next.run(request).await;
    }
    let message = format!("Missing or wrong {ACCESS_TOKEN_HEADER} header");
    if is_rpc(request.uri().path()) {
        let error = CallError {
            code: "unauthenticated".to_owned(),
            message,
        };
        return json(StatusCode::UNAUTHORIZED, &error);
    }
    Refusal {
        status: StatusCode::UNAUTHORIZED,
        message,
    }
    .into_response()
}

fn is_signed(guest: &Guest, request: &Request) -> bool {
    let operation = match *request.method() {
        Method::GET | Method::HEAD => Operation::Read,
        Method::POST => Operation::Write,
        _ => return false,
    };
    let Some(token) = guest.settings.lock().access_token.clone() else {
        return false;
    };
    request.uri().path() == FILES_PATH
        && signature::admits(request.uri().query(), operation, &token, SystemTime::now())
}
