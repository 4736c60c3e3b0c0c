//! `/v1/sandboxes`.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::listing::Filter;
use super::{Aimed, Segment, name};
use crate::body::JsonBody;
use crate::control_plane::ControlPlane;
use crate::options::Place;
use crate::problem::{ApiError, Problem};
use crate::wire::{
    ConsoleLine, CreateSandbox, DiskLimits, DiskStats, ExecRequest, ExecResult, ForkSandbox,
    GuestMetrics, MAX_FORKS, MAX_TIMEOUT_S, MemoryStats, NetworkPolicy, ResumeSandbox, Sandbox,
    SetTimeout,
};

pub(crate) async fn list<C: ControlPlane>(
    State(control): State<C>,
    query: RawQuery,
) -> Result<(HeaderMap, Json<Vec<Sandbox>>), ApiError> {
    let filter = Filter::read(&query)?;
    let (headers, page) = filter.page(control.list().await?);
    Ok((headers, Json(page)))
}

pub(crate) async fn create<C: ControlPlane>(
    State(control): State<C>,
    JsonBody(request): JsonBody<CreateSandbox>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    request.network.check("network.")?;
    request.disk_limits.check("disk_limits.")?;
    check_timeout(request.timeout_s)?;
    let created = control.create(request).await?;
    let status = if created.existed {
        StatusCode::OK
    } else {
        StatusCode::CREATED
    };
    Ok((status, Json(created.sandbox)))
}

fn check_timeout(timeout_s: Option<u64>) -> Result<(), ApiError> {
    match timeout_s.filter(|seconds| *seconds > MAX_TIMEOUT_S) {
        None => Ok(()),
        Some(seconds) => Err(ApiError::BadRequest {
            field: "timeout_s".into(),
            detail: format!("is {seconds}; up to {MAX_TIMEOUT_S} is possible, or none for ever"),
        }),
    }
}

pub(crate) async fn get<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
) -> Result<Json<Sandbox>, ApiError> {
    control.get(name("id", &id)?).await.map(Json)
}

pub(crate) async fn pause<C: ControlPlane>(
    State(control): State<C>,
    Aimed(aim): Aimed,
) -> Result<Json<Sandbox>, ApiError> {
    control.pause(aim).await.map(Json)
}

pub(crate) async fn resume<C: ControlPlane>(
    State(control): State<C>,
    Aimed(aim): Aimed,
    JsonBody(request): JsonBody<ResumeSandbox>,
) -> Result<Json<Sandbox>, ApiError> {
    check_timeout(request.timeout_s)?;
    control.resume(aim, request).await.map(Json)
}

pub(crate) async fn set_timeout<C: ControlPlane>(
    State(control): State<C>,
    Aimed(aim): Aimed,
    JsonBody(request): JsonBody<SetTimeout>,
) -> Result<Json<Sandbox>, ApiError> {
    check_timeout(request.timeout_s)?;
    control.set_timeout(aim, request).await.map(Json)
}

/// Forks that were made, and what became of the others.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Forks {
    sandboxes: Vec<Sandbox>,
    errors: Vec<Problem>,
}

pub(crate) async fn fork<C: ControlPlane>(
    State(control): State<C>,
    Aimed(aim): Aimed,
    JsonBody(request): JsonBody<ForkSandbox>,
) -> Result<(StatusCode, Json<Forks>), ApiError> {
    check_timeout(request.timeout_s)?;
    if !(1..=MAX_FORKS).contains(&request.count) {
        return Err(ApiError::BadRequest {
            field: "count".into(),
            detail: format!("is {}; 1 to {MAX_FORKS} are possible", request.count),
        });
    }
    let mut forks = Forks {
        sandboxes: Vec::new(),
        errors: Vec::new(),
    };
    for fork in control.fork(aim, request).await? {
        match fork {
            Ok(sandbox) => forks.sandboxes.push(sandbox),
            Err(error) => forks.errors.push(error.problem()),
        }
    }
    Ok((StatusCode::CREATED, Json(forks)))
}

pub(crate) async fn metrics<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
) -> Result<Json<GuestMetrics>, ApiError> {
    control.metrics(name("id", &id)?).await.map(Json)
}

/// `?state=running,failed&timeout_ms=`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WaitFor {
    state: Option<String>,
    timeout_ms: Option<u64>,
}

/// The longest that a request waits.
const MAX_WAIT: Duration = Duration::from_secs(300);

pub(crate) async fn wait<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
    _place: Place,
    asked: Result<Query<WaitFor>, QueryRejection>,
) -> Result<Json<Sandbox>, ApiError> {
    let id = name("id", &id)?;
    let Query(asked) = asked.map_err(|error| ApiError::BadRequest {
        field: "query".into(),
        detail: error.body_text(),
    })?;
    let names = asked.state.as_deref().unwrap_or("running,paused,failed");
    let state = |name: &str| {
        let json = serde_json::Value::String(name.trim().to_owned());
        serde_json::from_value(json).map_err(|error| ApiError::BadRequest {
            field: "state".into(),
            detail: error.to_string(),
        })
    };
    let states = names.split(',').map(state).collect::<Result<_, _>>()?;
    let patience = asked.timeout_ms.map_or(MAX_WAIT, Duration::from_millis);
    control
        .wait(id, states, patience.min(MAX_WAIT))
        .await
        .map(Json)
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

pub(crate) async fn console<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
) -> Result<Json<Vec<ConsoleLine>>, ApiError> {
    control.console(name("id", &id)?).await.map(Json)
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

pub(crate) async fn limit_disk<C: ControlPlane>(
    State(control): State<C>,
    Segment(id): Segment,
    JsonBody(limits): JsonBody<DiskLimits>,
) -> Result<Json<Sandbox>, ApiError> {
    let id = name("id", &id)?;
    limits.check("")?;
    control.limit_disk(id, limits).await.map(Json)
}

pub(crate) async fn delete<C: ControlPlane>(
    State(control): State<C>,
    Aimed(aim): Aimed,
) -> Result<StatusCode, ApiError> {
    control.delete(aim).await?;
    Ok(StatusCode::NO_CONTENT)
}
