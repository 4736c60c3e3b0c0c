//! Create, look at, pause, bring back, destroy.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use tokio::time::timeout;

use super::refusal::{Body, Id, Refusal, bad};
use super::wire::{Capsule, Current, LIMIT_LABEL, Metrics, NewCapsule, Point, Stats, limit};
use crate::clock::now_ms;
use crate::context;
use crate::control_plane::ControlPlane;
use crate::ids::SandboxId;
use crate::problem::ApiError;
use crate::wire::{
    CreateSandbox, DiskLimits, MAX_TIMEOUT_S, NetworkPolicy, OnTimeout, ResumeSandbox, Sandbox,
    SandboxState, SetTimeout,
};

/// What is started when a request doesn't say. Source: Wrenn's API.
const DEFAULT_TEMPLATE: &str = "minimal-ubuntu";
/// The shortest time limit; shorter ones are taken for this. Source: Wrenn's API.
const MIN_LIMIT_S: u64 = 60;
/// After this long a request is answered with the state on the way.
const PROMPT: Duration = Duration::from_secs(2);

type Answer = Result<(StatusCode, Json<Capsule>), Refusal>;

pub(super) async fn create<C: ControlPlane>(
    State(control): State<C>,
    Body(request): Body<NewCapsule>,
) -> Answer {
    let template = request.template.as_deref().unwrap_or(DEFAULT_TEMPLATE);
    let template = template
        .parse()
        .map_err(|error| bad("template", format!("{error}")))?;
    let limit_s = match request.timeout_sec.unwrap_or(0) {
        0 => None,
        seconds if seconds > MAX_TIMEOUT_S => {
            let detail = format!("is {seconds} s; up to {MAX_TIMEOUT_S} are possible");
            return Err(bad("timeout_sec", detail).into());
        }
        seconds => Some(seconds.max(MIN_LIMIT_S)),
    };
    let mut labels = request.metadata.unwrap_or_default();
    if labels.contains_key(LIMIT_LABEL) {
        let detail = format!("has {LIMIT_LABEL}, which is the host's own");
        return Err(bad("metadata", detail).into());
    }
    if let Some(seconds) = limit_s {
        labels.insert(LIMIT_LABEL.to_owned(), seconds.to_string());
    }
    let id = fresh_id();
    let request = CreateSandbox {
        template,
        id: Some(id.clone()),
        vcpus: request.vcpus,
        memory_mb: request.memory_mb,
        huge_pages: None,
        disk_size_mb: None,
        env: [].into(),
        labels,
        network: NetworkPolicy::default(),
        disk_limits: DiskLimits::default(),
        timeout_s: limit_s,
        on_timeout: OnTimeout::Pause,
        auto_resume: false,
    };
    let creating = control.clone();
    let made = async move { Ok(creating.create(request).await?.sandbox) };
    promptly(&control, id, StatusCode::CREATED, made).await
}

/// Nobody else's: keyed by the system's random numbers.
fn fresh_id() -> SandboxId {
    let numbers = [(); 4].map(|()| RandomState::new().hash_one(now_ms()));
    SandboxId::of_key(numbers.map(u64::to_le_bytes).as_flattened())
}

/// Does something, and answers with how it went or, when that takes long, with how it goes.
async fn promptly<C: ControlPlane>(
    control: &C,
    id: SandboxId,
    done: StatusCode,
    work: impl Future<Output = Result<Sandbox, ApiError>> + Send + 'static,
) -> Answer {
    let mut work = tokio::spawn(context::within(context::current(), work));
    let ended = |result: Result<Result<Sandbox, ApiError>, tokio::task::JoinError>| {
        let failed = |_| ApiError::Failed {
            code: "internal",
            detail: "The task that did it failed".into(),
        };
        result.unwrap_or_else(|error| Err(failed(error)))
    };
    if let Ok(result) = timeout(PROMPT, &mut work).await {
        return Ok((done, Json(ended(result)?.into())));
    }
    match control.get(id).await {
        Ok(sandbox) => Ok((StatusCode::ACCEPTED, Json(sandbox.into()))),
        // It has failed just now, or has not begun.
        Err(ApiError::NotFound { .. }) => Ok((done, Json(ended(work.await)?.into()))),
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn list<C: ControlPlane>(
    State(control): State<C>,
) -> Result<Json<Vec<Capsule>>, Refusal> {
    let all = control.list().await?;
    Ok(Json(all.into_iter().map(Capsule::from).collect()))
}

pub(super) async fn stats<C: ControlPlane>(
    State(control): State<C>,
) -> Result<Json<Stats>, Refusal> {
    let mut current = Current::default();
    for sandbox in control.list().await? {
        if !matches!(sandbox.state, SandboxState::Paused | SandboxState::Failed) {
            current.running_count += 1;
            current.vcpus_reserved += u64::from(sandbox.vcpus);
            current.memory_mb_reserved += u64::from(sandbox.memory_mb);
        }
    }
    Ok(Json(Stats { current }))
}

pub(super) async fn info<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
) -> Result<Json<Capsule>, Refusal> {
    Ok(Json(control.get(id).await?.into()))
}

pub(super) async fn destroy<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
) -> Result<StatusCode, Refusal> {
    control.delete(id.into()).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn pause<C: ControlPlane>(State(control): State<C>, Id(id): Id) -> Answer {
    let (pausing, which) = (control.clone(), id.clone());
    let paused = async move { pausing.pause(which.into()).await };
    promptly(&control, id, StatusCode::OK, paused).await
}

pub(super) async fn resume<C: ControlPlane>(State(control): State<C>, Id(id): Id) -> Answer {
    let timeout_s = limit(&control.get(id.clone()).await?);
    let (resuming, which) = (control.clone(), id.clone());
    let request = ResumeSandbox { timeout_s };
    let resumed = async move { resuming.resume(which.into(), request).await };
    promptly(&control, id, StatusCode::OK, resumed).await
}

pub(super) async fn ping<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
) -> Result<StatusCode, Refusal> {
    touch(&control, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Begins a capsule's time limit anew, if it has one.
pub(super) async fn touch<C: ControlPlane>(control: &C, id: &SandboxId) -> Result<(), ApiError> {
    let Some(seconds) = limit(&control.get(id.clone()).await?) else {
        return Ok(());
    };
    let request = SetTimeout {
        timeout_s: Some(seconds),
        extend_only: true,
    };
    control
        .set_timeout(id.clone().into(), request)
        .await
        .map(|_| ())
}

/// One sample, taken now; none of a capsule that doesn't run.
pub(super) async fn metrics<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
) -> Result<Json<Metrics>, Refusal> {
    let mut points = Vec::new();
    if control.get(id.clone()).await?.state == SandboxState::Running {
        let metrics = control.metrics(id.clone()).await?;
        points.push(Point {
            timestamp_unix: metrics.timestamp_s,
            cpu_pct: metrics.cpu_used_percent,
            mem_bytes: metrics.memory_used_bytes,
            disk_bytes: metrics.disk_used_bytes,
        });
    }
    let sandbox_id = id.to_string();
    Ok(Json(Metrics { sandbox_id, points }))
}
