//! Is the daemon there, does it take requests, what is it.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;

use crate::control_plane::{ControlPlane, Readiness};
use crate::problem::ApiError;
use crate::wire::{Drained, HostInfo, Reconciled};

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

/// No new work, and everything that runs to disk; answered when that is done.
pub(crate) async fn drain<C: ControlPlane>(
    State(control): State<C>,
) -> Result<Json<Drained>, ApiError> {
    control.drain().await.map(Json)
}

/// Away with what belongs to nobody.
pub(crate) async fn reconcile<C: ControlPlane>(
    State(control): State<C>,
) -> Result<Json<Reconciled>, ApiError> {
    control.reconcile().await.map(Json)
}

/// Work again.
pub(crate) async fn undrain<C: ControlPlane>(
    State(control): State<C>,
) -> Result<StatusCode, ApiError> {
    control.undrain().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The API for programs.
pub(crate) async fn openapi() -> Json<serde_json::Value> {
    Json(crate::openapi::document())
}

/// The API for people.
pub(crate) async fn docs() -> impl IntoResponse {
    crate::openapi::page()
}

/// Numbers for Prometheus.
pub(crate) async fn metrics<C: ControlPlane>(
    State(control): State<C>,
) -> Result<impl IntoResponse, ApiError> {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(CONTENT_TYPE, kind)], control.prometheus().await?))
}
