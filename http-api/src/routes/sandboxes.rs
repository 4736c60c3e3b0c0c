//! `/v1/sandboxes`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::{Segment, name};
use crate::body::JsonBody;
use crate::control_plane::ControlPlane;
use crate::problem::ApiError;
use crate::wire::{
    CreateSandbox, DiskStats, ExecRequest, ExecResult, MemoryStats, NetworkPolicy, Sandbox,
};

pub(crate) async fn list<C: ControlPlane>(
    State(control): State<C>,
) -> Result<Json<Vec<Sandbox>>, ApiError> {
    control.list().await.map(Json)
}

pub(crate) async fn create<C: ControlPlane>(
    State(control): State<C>,
    JsonBody(request): JsonBody<CreateSandbox>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    request.network.check("network.")?;
    let sandbox = control.create(request).await?;
    Ok((StatusCode::CREATED, Json(sandbox)))
}

pub(crate) async fn get<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
) -> Result<Json<Sandbox>, ApiError> {
    control.get(name("id", &id)?).await.map(Json)
}

pub(crate) async fn pause<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
) -> Result<Json<Sandbox>, ApiError> {
    control.pause(name("id", &id)?).await.map(Json)
}

pub(crate) async fn resume<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
) -> Result<Json<Sandbox>, ApiError> {
    control.resume(name("id", &id)?).await.map(Json)
}

pub(crate) async fn exec<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
    JsonBody(request): JsonBody<ExecRequest>,
) -> Result<Json<ExecResult>, ApiError> {
    let id = name("id", &id)?;
    if request.cmd.is_empty() {
        return Err(ApiError::BadRequest {
            field: "cmd".into(),
            detail: "is empty".into(),
        });
    }
    control.exec(id, request).await.map(Json)
}

pub(crate) async fn memory<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
) -> Result<Json<MemoryStats>, ApiError> {
    control.memory(name("id", &id)?).await.map(Json)
}

pub(crate) async fn disk<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
) -> Result<Json<DiskStats>, ApiError> {
    control.disk(name("id", &id)?).await.map(Json)
}

pub(crate) async fn set_network<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
    JsonBody(policy): JsonBody<NetworkPolicy>,
) -> Result<Json<Sandbox>, ApiError> {
    let id = name("id", &id)?;
    policy.check("")?;
    control.set_network(id, policy).await.map(Json)
}

pub(crate) async fn delete<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
) -> Result<StatusCode, ApiError> {
    control.delete(name("id", &id)?).await?;
    Ok(StatusCode::NO_CONTENT)
}
