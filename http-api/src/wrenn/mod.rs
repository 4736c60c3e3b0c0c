//! The routes that clients of Wrenn ask: the same control plane, in their words.
//!
//! They stand twice. Below `/api` is all of it, as on Wrenn's own host, so that these clients'
//! `WRENN_BASE_URL` ends there; at the root is what has a name of its own, `/v1/capsules`, because
//! `/v1/snapshots` there is the native API's.
//!
//! What takes long is answered with the state on the way (202) rather than not at all: these clients
//! give up soon, and ask again how it went. Time limits are of inactivity: a command or a `ping`
//! begins them anew, and their end is a pause.
//!
//! Source: the `wrenn` package 0.3.0 for Python and the models in it.

mod capsules;
mod files;
mod processes;
mod refusal;
mod snapshots;
mod stream;
mod wire;

pub(crate) use refusal::Refusal;

use axum::extract::DefaultBodyLimit;
use axum::routing::{MethodRouter, delete, get, post};

use crate::control_plane::ControlPlane;
use crate::processes::Processes;
use crate::router::Table;

/// Whether a path is one of theirs, and its errors, too.
pub(crate) fn speaks(path: &str) -> bool {
    let below = |root: &str| {
        let rest = path.strip_prefix(root);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    below("/api") || below("/v1/capsules")
}

/// Routes at the root and below `/api`.
macro_rules! twice {
    ($(($method:literal, $path:literal, $answer:expr),)*) => {
        vec![$(
            ($method, concat!("/v1/capsules", $path), $answer),
            ($method, concat!("/api/v1/capsules", $path), $answer),
        )*]
    };
}

/// All routes.
pub(crate) fn table<C: ControlPlane + Processes>() -> Table<C> {
    let read = || post(files::read::<C>);
    // A file may have any size.
    let write =
        || -> MethodRouter<C> { post(files::write::<C>).layer(DefaultBodyLimit::disable()) };
    let mut table: Table<C> = twice![
        ("POST", "", post(capsules::create::<C>)),
        ("GET", "", get(capsules::list::<C>)),
        ("GET", "/stats", get(capsules::stats::<C>)),
        ("GET", "/{id}", get(capsules::info::<C>)),
        ("DELETE", "/{id}", delete(capsules::destroy::<C>)),
        ("POST", "/{id}/pause", post(capsules::pause::<C>)),
        ("POST", "/{id}/resume", post(capsules::resume::<C>)),
        ("POST", "/{id}/ping", post(capsules::ping::<C>)),
        ("GET", "/{id}/metrics", get(capsules::metrics::<C>)),
        ("POST", "/{id}/exec", post(processes::exec::<C>)),
        ("GET", "/{id}/exec/stream", get(stream::exec::<C>)),
        ("GET", "/{id}/pty", get(stream::pty::<C>)),
        ("GET", "/{id}/processes", get(processes::list::<C>)),
        (
            "DELETE",
            "/{id}/processes/{pid}",
            delete(processes::kill::<C>)
        ),
        (
            "GET",
            "/{id}/processes/{pid}/stream",
            get(stream::process::<C>)
        ),
        ("POST", "/{id}/files/read", read()),
        ("POST", "/{id}/files/stream/read", read()),
        ("POST", "/{id}/files/write", write()),
        ("POST", "/{id}/files/stream/write", write()),
        ("POST", "/{id}/files/list", post(files::list::<C>)),
        ("POST", "/{id}/files/mkdir", post(files::make_dir::<C>)),
        ("POST", "/{id}/files/remove", post(files::remove::<C>)),
    ];
    table.extend([
        ("POST", "/api/v1/snapshots", post(snapshots::create::<C>)),
        ("GET", "/api/v1/snapshots", get(snapshots::list::<C>)),
        (
            "DELETE",
            "/api/v1/snapshots/{name}",
            delete(snapshots::delete::<C>),
        ),
    ]);
    table
}

#[cfg(test)]
mod tests {
    use super::speaks;

    #[test]
    fn capsules_are_theirs_and_sandboxes_are_not() {
        for theirs in [
            "/api",
            "/api/v1/snapshots",
            "/v1/capsules",
            "/v1/capsules/a/exec",
        ] {
            assert!(speaks(theirs), "{theirs}");
        }
        for other in [
            "/v1/sandboxes",
            "/v1/snapshots",
            "/v1/capsulesx",
            "/apis",
            "/sandboxes",
        ] {
            assert!(!speaks(other), "{other}");
        }
    }
}
