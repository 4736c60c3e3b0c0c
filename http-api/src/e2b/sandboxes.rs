//! Create, look at, kill.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use serde::Deserialize;

use super::network::{Network, unsupported};
use super::refusal::{Body, Id, Part, Refusal, bad};
use super::wire::{Access, Detail, NewSandbox, Sample};
use super::{DEFAULT_TIMEOUT_S, known};
use crate::clock::now_ms;
use crate::control_plane::ControlPlane;
use crate::ids::{SandboxId, TemplateName};
use crate::options::Terms;
use crate::problem::ApiError;
use crate::wire::{CreateSandbox, DiskLimits, MAX_TIMEOUT_S, OnTimeout, SandboxState};

pub(super) async fn create<C: ControlPlane>(
    State(control): State<C>,
    Part(terms): Part<Terms>,
    headers: HeaderMap,
    Body(request): Body<NewSandbox>,
) -> Result<(StatusCode, Json<Access>), Refusal> {
    let mut request = translate(request)?;
    if let Some(key) = headers.get("idempotency-key") {
        request.id = Some(id_of_key(key.as_bytes())?);
    }
    let created = control.create(request).await?;
    Ok((
        StatusCode::CREATED,
        Json(Access::new(created.sandbox, &terms)),
    ))
}

fn translate(request: NewSandbox) -> Result<CreateSandbox, ApiError> {
    let some = |value: &Option<serde_json::Value>| value.as_ref().is_some_and(|v| !v.is_null());
    for (name, there) in [
        ("mcp", some(&request.mcp)),
        ("iam", some(&request.iam)),
        (
            "volumeMounts",
            request.volume_mounts.is_some_and(|m| !m.is_empty()),
        ),
        // A sandbox without its memory is another feature than the one we have.
        ("autoPauseMemory", request.auto_pause_memory == Some(false)),
    ] {
        if there {
            return Err(unsupported(name));
        }
    }
    let network = request.network.unwrap_or_default();
    let network = network.policy(request.allow_internet_access, "network.")?;
    let pauses = request.auto_pause == Some(true);
    Ok(CreateSandbox {
        template: template("templateID", &request.template_id)?,
        id: None,
        vcpus: None,
        memory_mb: None,
        huge_pages: None,
        disk_size_mb: None,
        env: request.env_vars.unwrap_or_default(),
        labels: request.metadata.unwrap_or_default(),
        network,
        disk_limits: DiskLimits::default(),
        timeout_s: Some(timeout("timeout", request.timeout)?),
        on_timeout: if pauses {
            OnTimeout::Pause
        } else {
            OnTimeout::Kill
        },
        auto_resume: request.auto_resume.is_some_and(|auto| auto.enabled),
    })
}

/// A template's name; these clients add a tag where they got none.
pub(super) fn template(field: &str, text: &str) -> Result<TemplateName, ApiError> {
    let name = text
        .strip_suffix(":default")
        .or_else(|| text.strip_suffix(":latest"));
    name.unwrap_or(text)
        .parse()
        .map_err(|error| bad(field, format!("{error}")))
}

/// Seconds that can be.
pub(super) fn timeout(field: &str, seconds: Option<u64>) -> Result<u64, ApiError> {
    let seconds = seconds.unwrap_or(DEFAULT_TIMEOUT_S);
    if seconds > MAX_TIMEOUT_S {
        let detail = format!("is {seconds} s; up to {MAX_TIMEOUT_S} are possible");
        return Err(bad(field, detail));
    }
    Ok(seconds)
}

/// The id that a key stands for: the same key finds the same sandbox, even after a restart, for as
/// long as that lives.
fn id_of_key(key: &[u8]) -> Result<SandboxId, ApiError> {
    let legal = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    if !(1..=255).contains(&key.len()) || !key.iter().all(legal) {
        let detail = "must have 1 to 255 lowercase letters, digits and '-'";
        return Err(bad("Idempotency-Key", detail));
    }
    Ok(SandboxId::of_key(key))
}

pub(super) async fn info<C: ControlPlane>(
    State(control): State<C>,
    Part(terms): Part<Terms>,
    Id(id): Id,
) -> Result<Json<Detail>, Refusal> {
    let sandbox = known(control.get(id).await?)?;
    Ok(Json(Detail::new(sandbox, &terms, now_ms())))
}

pub(super) async fn kill<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
) -> Result<StatusCode, Refusal> {
    control.delete(id.into()).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Deserialize)]
pub(super) struct Span {
    start: Option<u64>,
    end: Option<u64>,
}

/// One sample, taken now; none of a sandbox that doesn't run.
pub(super) async fn metrics<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
    span: Result<Query<Span>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Vec<Sample>>, Refusal> {
    let Query(span) = span.map_err(|error| bad("start, end", error.body_text()))?;
    let sandbox = known(control.get(id.clone()).await?)?;
    if sandbox.state != SandboxState::Running {
        return Ok(Json(Vec::new()));
    }
    let metrics = control.metrics(id).await?;
    let at = metrics.timestamp_s;
    let inside = span.start.is_none_or(|start| start <= at) && span.end.is_none_or(|end| at <= end);
    Ok(Json(inside.then(|| metrics.into()).into_iter().collect()))
}

pub(super) async fn set_network<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
    Body(network): Body<Network>,
) -> Result<StatusCode, Refusal> {
    let mut policy = network.policy(None, "")?;
    // These clients have no words for how fast, so they don't mean to change it.
    let before = control.get(id.clone()).await?.network;
    policy.egress_kbit_s = before.egress_kbit_s;
    policy.ingress_kbit_s = before.ingress_kbit_s;
    control.set_network(id, policy).await?;
    Ok(StatusCode::NO_CONTENT)
}
