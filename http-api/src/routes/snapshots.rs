//! `/v1/snapshots`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::{Segment, name};
use crate::body::JsonBody;
use crate::control_plane::ControlPlane;
use crate::problem::ApiError;
use crate::wire::{CreateSnapshot, Snapshot};

pub(crate) async fn list<C: ControlPlane>(
    State(control): State<C>,
) -> Result<Json<Vec<Snapshot>>, ApiError> {
    control.list_snapshots().await.map(Json)
}

pub(crate) async fn create<C: ControlPlane>(
    State(control): State<C>,
    JsonBody(request): JsonBody<CreateSnapshot>,
) -> Result<(StatusCode, Json<Snapshot>), ApiError> {
    let snapshot = control.create_snapshot(request).await?;
    Ok((StatusCode::CREATED, Json(snapshot)))
}

pub(crate) async fn get<C: ControlPlane>(
    State(control): State<C>,
    Segment(template): Segment,
) -> Result<Json<Snapshot>, ApiError> {
    control
        .get_snapshot(name("name", &template)?)
        .await
        .map(Json)
}

pub(crate) async fn delete<C: ControlPlane>(
    State(control): State<C>,
    Segment(template): Segment,
) -> Result<StatusCode, ApiError> {
    control.delete_snapshot(name("name", &template)?).await?;
    Ok(StatusCode::NO_CONTENT)
}
