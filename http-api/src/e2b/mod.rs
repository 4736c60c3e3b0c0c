//! The routes that E2B's clients ask: the same control plane, in their words.
//!
//! Fields that we don't know are ignored, because newer clients send more; what changes the
//! sandbox and can't be had here is refused by name. A failed sandbox is not found: that is how
//! one that crashed looks to these clients.
//!
//! Source: the `e2b` packages (Python 2.50 to 2.63, JavaScript 2.51) and `@e2b/cli` 2.19.

mod lifecycle;
mod listing;
mod logs;
mod network;
mod refusal;
mod sandboxes;
mod snapshots;
mod wire;

pub(crate) use refusal::Refusal;

use axum::routing::{delete, get, post, put};

use crate::control_plane::ControlPlane;
use crate::problem::ApiError;
use crate::router::Table;
use crate::wire::{Sandbox, SandboxState};

/// What gates features in the clients: the version of envd that ours speaks like.
pub const ENVD_VERSION: &str = "0.6.4";

/// How long a sandbox lives when a request doesn't say, in seconds. Source: E2B's API.
const DEFAULT_TIMEOUT_S: u64 = 300;

/// Whether a path is one of theirs, and its errors, too.
pub(crate) fn speaks(path: &str) -> bool {
    let first = path.split('/').nth(1).unwrap_or_default();
    matches!(first, "sandboxes" | "snapshots" | "templates" | "v2" | "v3")
}

/// All routes.
pub(crate) fn table<C: ControlPlane>() -> Table<C> {
    let create = || post(sandboxes::create::<C>);
    let connect = || post(lifecycle::connect::<C>);
    let templates = || get(snapshots::templates::<C>);
    vec![
        ("POST", "/sandboxes", create()),
        ("POST", "/v2/sandboxes", create()),
        ("GET", "/sandboxes", get(listing::running::<C>)),
        ("GET", "/v2/sandboxes", get(listing::page::<C>)),
        ("GET", "/sandboxes/{id}", get(sandboxes::info::<C>)),
        ("DELETE", "/sandboxes/{id}", delete(sandboxes::kill::<C>)),
        (
            "GET",
            "/sandboxes/{id}/metrics",
            get(sandboxes::metrics::<C>),
        ),
        ("GET", "/sandboxes/{id}/logs", get(logs::logs::<C>)),
        ("GET", "/v2/sandboxes/{id}/logs", get(logs::logs_v2::<C>)),
        (
            "PUT",
            "/sandboxes/{id}/network",
            put(sandboxes::set_network::<C>),
        ),
        ("POST", "/sandboxes/{id}/pause", post(lifecycle::pause::<C>)),
        (
            "POST",
            "/sandboxes/{id}/resume",
            post(lifecycle::resume::<C>),
        ),
        ("POST", "/sandboxes/{id}/connect", connect()),
        ("POST", "/v2/sandboxes/{id}/connect", connect()),
        (
            "POST",
            "/sandboxes/{id}/timeout",
            post(lifecycle::timeout::<C>),
        ),
        (
            "POST",
            "/sandboxes/{id}/refreshes",
            post(lifecycle::refresh::<C>),
        ),
        ("POST", "/sandboxes/{id}/fork", post(lifecycle::fork::<C>)),
        (
            "POST",
            "/sandboxes/{id}/snapshots",
            post(snapshots::create::<C>),
        ),
        ("GET", "/snapshots", get(snapshots::list::<C>)),
        ("GET", "/templates", templates()),
        ("GET", "/v2/templates", templates()),
        ("DELETE", "/templates/{id}", delete(snapshots::delete::<C>)),
        (
            "GET",
            "/templates/aliases/{name}",
            get(snapshots::alias::<C>),
        ),
    ]
}

/// One that these clients may know of.
fn known(sandbox: Sandbox) -> Result<Sandbox, ApiError> {
    if matches!(
        sandbox.state,
        SandboxState::Failed | SandboxState::Destroying
    ) {
        return Err(not_found(sandbox.id.as_str()));
    }
    Ok(sandbox)
}

fn not_found(id: &str) -> ApiError {
    ApiError::NotFound {
        what: "sandbox",
        name: id.to_owned(),
    }
}
