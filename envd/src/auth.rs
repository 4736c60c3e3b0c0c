//! The one gate before every route: once a token is set, all but `/health` ask for it.
//!
//! It wraps the whole router, the fallback included, so a route that is added later is behind it.
//! A Connect call gets a Connect error, everything else the plain `{code, message}`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use crate::protocol::envelope::CallError;
use crate::protocol::{ACCESS_TOKEN_HEADER, HEALTH_PATH};
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
    if request.uri().path() == HEALTH_PATH || guest.settings.admits(presented) {
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
