//! Templates.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use serde::Deserialize;

use super::refusal::{Body, Part, Refusal, bad};
use super::wire::{NewSnapshot, Template};
use crate::control_plane::ControlPlane;
use crate::problem::ApiError;
use crate::routes::Segment;
use crate::wire::CreateSnapshot;

#[derive(Debug, Deserialize)]
pub(super) struct Asked {
    overwrite: Option<bool>,
    r#type: Option<String>,
}

fn read(asked: Result<Query<Asked>, QueryRejection>) -> Result<Asked, ApiError> {
    let Query(asked) = asked.map_err(|error| bad("query", error.body_text()))?;
    Ok(asked)
}

pub(super) async fn create<C: ControlPlane>(
    State(control): State<C>,
    asked: Result<Query<Asked>, QueryRejection>,
    Body(request): Body<NewSnapshot>,
) -> Result<(StatusCode, Json<Template>), Refusal> {
    if read(asked)?.overwrite == Some(true) {
        let detail = "is not possible here; delete the template first";
        return Err(bad("overwrite", detail).into());
    }
    let name = request.name.map(|name| name.parse()).transpose();
    let request = CreateSnapshot {
        sandbox: request
            .sandbox_id
            .parse()
            .map_err(|error| bad("sandbox_id", format!("{error}")))?,
        name: name.map_err(|error| bad("name", format!("{error}")))?,
        execution_id: None,
    };
    let made = control.create_snapshot(request).await?;
    Ok((StatusCode::CREATED, Json(made.into())))
}

pub(super) async fn list<C: ControlPlane>(
    State(control): State<C>,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Result<Json<Vec<Template>>, Refusal> {
    let kind = read(asked)?.r#type;
    if let Some(kind) = kind
        .as_deref()
        .filter(|k| !matches!(*k, "base" | "snapshot"))
    {
        let detail = format!("is {kind:?}; base and snapshot are possible");
        return Err(bad("type", detail).into());
    }
    let all = control.list_snapshots().await?.into_iter();
    let mut all: Vec<Template> = all.map(Template::from).collect();
    all.retain(|template| kind.as_ref().is_none_or(|kind| template.r#type == kind));
    Ok(Json(all))
}

pub(super) async fn delete<C: ControlPlane>(
    State(control): State<C>,
    Part(Segment(name)): Part<Segment>,
) -> Result<StatusCode, Refusal> {
    let absent = |_| ApiError::NotFound {
        what: "template",
        name: name.clone(),
    };
    let name = name.parse().map_err(absent)?;
    control.delete_snapshot(name).await?;
    Ok(StatusCode::NO_CONTENT)
}
