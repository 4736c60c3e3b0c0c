//! Snapshots, and the templates they are.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};

use super::ENVD_VERSION;
use super::listing::{MAX_PAGE, next_token};
use super::network::unsupported;
use super::refusal::{Body, Id, Part, Refusal, bad};
use super::sandboxes::template;
use super::wire::Lifetime;
use crate::clock::rfc3339;
use crate::control_plane::ControlPlane;
use crate::problem::ApiError;
use crate::routes::Segment;
use crate::wire::{CreateSnapshot, Snapshot, SnapshotKind};

/// A snapshot; its id serves as `templateID`.
#[derive(Debug, Serialize)]
pub(super) struct Info {
    #[serde(rename = "snapshotID")]
    id: String,
    names: Vec<String>,
}

impl From<Snapshot> for Info {
    fn from(snapshot: Snapshot) -> Self {
        Self {
            id: snapshot.name.to_string(),
            names: vec![snapshot.name.to_string()],
        }
    }
}

pub(super) async fn create<C: ControlPlane>(
    State(control): State<C>,
    Id(sandbox): Id,
    Body(request): Body<Lifetime>,
) -> Result<(StatusCode, Json<Info>), Refusal> {
    if request.memory == Some(false) {
        return Err(unsupported("memory").into());
    }
    let name = request.name.as_deref().filter(|name| !name.is_empty());
    let name = name.map(|name| template("name", name)).transpose()?;
    let snapshot = control.create_snapshot(CreateSnapshot {
        sandbox,
        name,
        execution_id: None,
    });
    Ok((StatusCode::CREATED, Json(snapshot.await?.into())))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Filter {
    #[serde(rename = "sandboxID")]
    sandbox: Option<String>,
    name: Option<String>,
    limit: Option<usize>,
    next_token: Option<String>,
}

type Asked = Result<Query<Filter>, axum::extract::rejection::QueryRejection>;

pub(super) async fn list<C: ControlPlane>(
    State(control): State<C>,
    filter: Asked,
) -> Result<(HeaderMap, Json<Vec<Info>>), Refusal> {
    let Query(filter) = filter.map_err(|error| bad("query", error.body_text()))?;
    let limit = filter.limit.unwrap_or(MAX_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        let detail = format!("is {limit}; 1 to {MAX_PAGE} are possible");
        return Err(bad("limit", detail).into());
    }
    let mut found = control.list_snapshots().await?;
    let of = |snapshot: &Snapshot| snapshot.sandbox.as_ref().map(ToString::to_string);
    found.retain(|snapshot| {
        snapshot.kind == SnapshotKind::Memory
            && (filter.sandbox.is_none() || of(snapshot) == filter.sandbox)
            && filter
                .name
                .as_ref()
                .is_none_or(|n| snapshot.name.as_str() == n)
            && filter
                .next_token
                .as_ref()
                .is_none_or(|t| snapshot.name.as_str() > t.as_str())
    });
    let more = found.len() > limit;
    found.truncate(limit);
    let last = found.last().filter(|_| more).map(|s| s.name.to_string());
    let found = found.into_iter().map(Info::from).collect();
    Ok((next_token(last), Json(found)))
}

pub(super) async fn delete<C: ControlPlane>(
    State(control): State<C>,
    Part(Segment(name)): Part<Segment>,
) -> Result<StatusCode, Refusal> {
    let absent = |_| ApiError::NotFound {
        what: "template",
        name: name.clone(),
    };
    let name = template("templateID", &name).map_err(absent)?;
    control.delete_snapshot(name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// One template.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Template {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "buildID")]
    build_id: String,
    build_status: &'static str,
    build_count: u32,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u64,
    public: bool,
    aliases: Vec<String>,
    names: Vec<String>,
    created_at: String,
    updated_at: String,
    last_spawned_at: Option<String>,
    spawn_count: u32,
    created_by: Option<String>,
    envd_version: &'static str,
}

pub(super) async fn templates<C: ControlPlane>(
    State(control): State<C>,
) -> Result<Json<Vec<Template>>, Refusal> {
    let all = control.list_snapshots().await?;
    let all = all.into_iter().map(|snapshot| Template {
        template_id: snapshot.name.to_string(),
        build_id: snapshot.build.unwrap_or_default(),
        build_status: "ready",
        build_count: 1,
        cpu_count: snapshot.vcpus,
        memory_mb: snapshot.memory_mb,
        disk_size_mb: snapshot.disk_mb,
        public: false,
        aliases: vec![snapshot.name.to_string()],
        names: vec![snapshot.name.to_string()],
        created_at: rfc3339(snapshot.created_at_ms),
        updated_at: rfc3339(snapshot.created_at_ms),
        last_spawned_at: None,
        spawn_count: 0,
        created_by: None,
        envd_version: ENVD_VERSION,
    });
    Ok(Json(all.collect()))
}

/// Whether there is a template of this name.
#[derive(Debug, Serialize)]
pub(super) struct Alias {
    #[serde(rename = "templateID")]
    template_id: String,
    public: bool,
}

pub(super) async fn alias<C: ControlPlane>(
    State(control): State<C>,
    Part(Segment(name)): Part<Segment>,
) -> Result<Json<Alias>, Refusal> {
    let absent = |_| ApiError::NotFound {
        what: "template",
        name: name.clone(),
    };
    let name = template("alias", &name).map_err(absent)?;
    let found = control.get_snapshot(name).await?;
    Ok(Json(Alias {
        template_id: found.name.to_string(),
        public: false,
    }))
}
