//! All routes, and the answer to everything that is none.
//!
//! The routes are a table, so that a test can walk them.

use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{Method, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post, put};
use axum::{Extension, Router};

use crate::auth;
use crate::context;
use crate::control_plane::ControlPlane;
use crate::e2b;
use crate::options::{Options, Terms};
use crate::problem::ApiError;
use crate::processes::Processes;
use crate::routes::{events, health, inside, sandboxes, snapshots};
use crate::stream::{exec, pty};
use crate::wrenn;

/// Method, path, and what answers.
pub(crate) type Table<C> = Vec<(&'static str, &'static str, MethodRouter<C>)>;

fn native<C: ControlPlane + Processes>() -> Table<C> {
    // A file may have any size.
    let write = || put(inside::write::<C>).layer(DefaultBodyLimit::disable());
    let signal = "/v1/sandboxes/{id}/processes/{pid}/signal";
    vec![
        ("GET", "/livez", get(health::livez)),
        ("GET", "/readyz", get(health::readyz::<C>)),
        ("GET", "/metrics", get(health::metrics::<C>)),
        ("GET", "/openapi.json", get(health::openapi)),
        ("GET", "/docs", get(health::docs)),
        ("GET", "/v1/host", get(health::host::<C>)),
        ("POST", "/v1/host/drain", post(health::drain::<C>)),
        ("DELETE", "/v1/host/drain", delete(health::undrain::<C>)),
        ("POST", "/v1/host/reconcile", post(health::reconcile::<C>)),
        ("GET", "/v1/events", get(events::events::<C>)),
        ("GET", "/v1/sandboxes", get(sandboxes::list::<C>)),
        ("POST", "/v1/sandboxes", post(sandboxes::create::<C>)),
        ("GET", "/v1/sandboxes/{id}", get(sandboxes::get::<C>)),
        (
            "DELETE",
            "/v1/sandboxes/{id}",
            delete(sandboxes::delete::<C>),
        ),
        (
            "POST",
            "/v1/sandboxes/{id}/pause",
            post(sandboxes::pause::<C>),
        ),
        (
            "POST",
            "/v1/sandboxes/{id}/resume",
            post(sandboxes::resume::<C>),
        ),
        ("GET", "/v1/sandboxes/{id}/wait", get(sandboxes::wait::<C>)),
        (
            "POST",
            "/v1/sandboxes/{id}/timeout",
            post(sandboxes::set_timeout::<C>),
        ),
        (
            "POST",
            "/v1/sandboxes/{id}/fork",
            post(sandboxes::fork::<C>),
        ),
        (
            "POST",
            "/v1/sandboxes/{id}/exec",
            post(sandboxes::exec::<C>),
        ),
        (
            "GET",
            "/v1/sandboxes/{id}/exec/stream",
            get(exec::exec::<C>),
        ),
        ("GET", "/v1/sandboxes/{id}/pty", get(pty::pty::<C>)),
        (
            "GET",
            "/v1/sandboxes/{id}/processes",
            get(inside::processes::<C>),
        ),
        ("POST", signal, post(inside::signal::<C>)),
        ("GET", "/v1/sandboxes/{id}/files", get(inside::read::<C>)),
        ("PUT", "/v1/sandboxes/{id}/files", write()),
        (
            "GET",
            "/v1/sandboxes/{id}/files/list",
            get(inside::list::<C>),
        ),
        (
            "GET",
            "/v1/sandboxes/{id}/memory",
            get(sandboxes::memory::<C>),
        ),
        (
            "GET",
            "/v1/sandboxes/{id}/console",
            get(sandboxes::console::<C>),
        ),
        ("GET", "/v1/sandboxes/{id}/disk", get(sandboxes::disk::<C>)),
        (
            "GET",
            "/v1/sandboxes/{id}/metrics",
            get(sandboxes::metrics::<C>),
        ),
        (
            "PUT",
            "/v1/sandboxes/{id}/network",
            put(sandboxes::set_network::<C>),
        ),
        (
            "PUT",
            "/v1/sandboxes/{id}/disk",
            put(sandboxes::limit_disk::<C>),
        ),
        ("GET", "/v1/snapshots", get(snapshots::list::<C>)),
        ("POST", "/v1/snapshots", post(snapshots::create::<C>)),
        ("GET", "/v1/snapshots/{name}", get(snapshots::get::<C>)),
        (
            "DELETE",
            "/v1/snapshots/{name}",
            delete(snapshots::delete::<C>),
        ),
    ]
}

fn table<C: ControlPlane + Processes>() -> Table<C> {
    let mut table = native();
    table.extend(e2b::table());
    table.extend(wrenn::table());
    table
}

/// Method and path of every route there is.
#[must_use]
pub fn routes<C: ControlPlane + Processes>() -> Vec<(&'static str, &'static str)> {
    let routes = table::<C>().into_iter();
    routes.map(|(method, path, _)| (method, path)).collect()
}

/// The whole API over one control plane, for a listener with these options.
pub fn router<C: ControlPlane + Processes>(control: C, options: impl Into<Options>) -> Router {
    let options = options.into();
    let mut router = Router::new();
    for (_method, path, answer) in table::<C>() {
        router = router.route(path, answer);
    }
    router
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(options.limits.body_bytes))
        .layer(from_fn_with_state(
            (control.clone(), options.access.clone()),
            auth::guard::<C>,
        ))
        .layer(Extension(Terms::new(&options)))
        .layer(from_fn(context::enter))
        .with_state(control)
}

/// An error in the words of whoever asks on this path.
pub(crate) fn refused(path: &str, error: ApiError) -> Response {
    if e2b::speaks(path) {
        e2b::Refusal(error).into_response()
    } else if wrenn::speaks(path) {
        wrenn::Refusal(error).into_response()
    } else {
        error.into_response()
    }
}

async fn no_route(request: Request) -> Response {
    absent(request.uri(), request.uri().path().to_owned())
}

async fn no_method(method: Method, uri: Uri) -> Response {
    absent(&uri, format!("{method} {}", uri.path()))
}

fn absent(uri: &Uri, name: String) -> Response {
    let what = "route";
    let error = ApiError::NotFound { what, name };
    refused(uri.path(), error)
}
