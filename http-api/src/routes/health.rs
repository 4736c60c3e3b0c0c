//! Is the daemon there, does it take requests, what is it.

use axum::Json;
use axum::extract::State;

use crate::control_plane::{ControlPlane, Readiness};
use crate::problem::ApiError;
use crate::wire::HostInfo;

/// Answers as long as a thread of the daemon runs.
pub(crate) async fn livez() -> &'static str {
    "ok"
}

pub(crate) async fn readyz<C: ControlPlane>(
    State(control): State<C>,
) -> Result<&'static str, ApiError> {
    match control.readiness().await {
        Readiness::Ready => Ok("ok"),
        Readiness::NotReady(detail) => Err(ApiError::Unavailable { detail }),
    }
}

pub(crate) async fn host<C: ControlPlane>(
    State(control): State<C>,
) -> Result<Json<HostInfo>, ApiError> {
    control.host().await.map(Json)
}
