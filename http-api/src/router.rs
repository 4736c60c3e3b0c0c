//! All routes, and the answer to everything that is none.

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Uri};
use axum::routing::{get, post, put};

use crate::body::MAX_BODY_BYTES;
use crate::control_plane::ControlPlane;
use crate::problem::ApiError;
use crate::routes::{health, sandboxes, snapshots};

/// The whole API over one control plane.
pub fn router<C: ControlPlane>(control: C) -> Router {
    Router::new()
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz::<C>))
        .route("/v1/host", get(health::host::<C>))
        .route(
            "/v1/sandboxes",
            get(sandboxes::list::<C>).post(sandboxes::create::<C>),
        )
        .route(
            "/v1/sandboxes/{id}",
            get(sandboxes::get::<C>).delete(sandboxes::delete::<C>),
        )
        .route("/v1/sandboxes/{id}/pause", post(sandboxes::pause::<C>))
        .route("/v1/sandboxes/{id}/resume", post(sandboxes::resume::<C>))
        .route("/v1/sandboxes/{id}/exec", post(sandboxes::exec::<C>))
        .route("/v1/sandboxes/{id}/memory", get(sandboxes::memory::<C>))
        .route("/v1/sandboxes/{id}/disk", get(sandboxes::disk::<C>))
        .route(
            "/v1/sandboxes/{id}/network",
            put(sandboxes::set_network::<C>),
        )
        .route(
            "/v1/snapshots",
            get(snapshots::list::<C>).post(snapshots::create::<C>),
        )
        .route(
            "/v1/snapshots/{name}",
            get(snapshots::get::<C>).delete(snapshots::delete::<C>),
        )
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(control)
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::NotFound {
        what: "route",
        name: uri.path().to_owned(),
    }
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::NotFound {
        what: "route",
        name: format!("{method} {}", uri.path()),
    }
}
