//! Pause, come back, live longer, fork.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;

use super::refusal::{Body, Id, Part, Refusal, bad};
use super::sandboxes::timeout as seconds;
use super::wire::{Access, Lifetime};
use super::{known, network::unsupported, not_found};
use crate::control_plane::ControlPlane;
use crate::ids::SandboxId;
use crate::options::Terms;
use crate::problem::ApiError;
use crate::wire::{ForkSandbox, MAX_FORKS, ResumeSandbox, Sandbox, SandboxState, SetTimeout};

/// How long a request waits for what is being done to its sandbox already.
const PATIENCE: Duration = Duration::from_secs(50);
/// How often a sandbox may change under a request before that is given up.
const TURNS: usize = 5;

/// One that is not on its way from one state to another.
async fn settled<C: ControlPlane>(control: &C, id: &SandboxId) -> Result<Sandbox, ApiError> {
    let states = vec![
        SandboxState::Running,
        SandboxState::Paused,
        SandboxState::Failed,
    ];
    known(control.wait(id.clone(), states, PATIENCE).await?)
}

pub(super) async fn pause<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
    Body(request): Body<Lifetime>,
) -> Result<StatusCode, Refusal> {
    if request.memory == Some(false) {
        return Err(unsupported("memory").into());
    }
    settled(&control, &id).await?;
    control.pause(id.into()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The old way: a running sandbox is a conflict.
pub(super) async fn resume<C: ControlPlane>(
    State(control): State<C>,
    Part(terms): Part<Terms>,
    Id(id): Id,
    Body(request): Body<Lifetime>,
) -> Result<(StatusCode, Json<Access>), Refusal> {
    if request.auto_pause == Some(true) {
        return Err(unsupported("autoPause").into());
    }
    let timeout_s = Some(seconds("timeout", request.timeout)?);
    settled(&control, &id).await?;
    let resumed = control
        .resume(id.into(), ResumeSandbox { timeout_s })
        .await?;
    Ok((StatusCode::CREATED, Json(Access::new(resumed, &terms))))
}

/// Whatever it is now, it runs afterwards: 200 when it ran already, 201 when it was brought back.
pub(super) async fn connect<C: ControlPlane>(
    State(control): State<C>,
    Part(terms): Part<Terms>,
    Id(id): Id,
    Body(request): Body<Lifetime>,
) -> Result<(StatusCode, Json<Access>), Refusal> {
    if request.memory == Some(false) {
        return Err(unsupported("memory").into());
    }
    let timeout_s = Some(seconds("timeout", request.timeout)?);
    let mut last = not_found(id.as_str());
    for _ in 0..TURNS {
        let sandbox = settled(&control, &id).await?;
        let (status, answer) = match sandbox.state {
            SandboxState::Paused => {
                let resumed = control.resume(id.clone().into(), ResumeSandbox { timeout_s });
                (StatusCode::CREATED, resumed.await)
            }
            _ => {
                let extended = SetTimeout {
                    timeout_s,
                    extend_only: true,
                };
                let extended = control.set_timeout(id.clone().into(), extended);
                (StatusCode::OK, extended.await)
            }
        };
        match answer {
            // It was paused between the look and the change.
            Ok(sandbox) if sandbox.state == SandboxState::Paused => {}
            Ok(sandbox) => return Ok((status, Json(Access::new(sandbox, &terms)))),
            // Somebody else was faster; look again.
            Err(error @ ApiError::Denied { .. }) => last = error,
            Err(error) => return Err(error.into()),
        }
    }
    Err(last.into())
}

pub(super) async fn timeout<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
    Body(request): Body<Lifetime>,
) -> Result<StatusCode, Refusal> {
    let Some(asked) = request.timeout else {
        return Err(bad("timeout", "is missing").into());
    };
    let request = SetTimeout {
        timeout_s: Some(seconds("timeout", Some(asked))?),
        extend_only: false,
    };
    known(control.set_timeout(id.into(), request).await?)?;
    Ok(StatusCode::NO_CONTENT)
}

/// The old way to live longer.
pub(super) async fn refresh<C: ControlPlane>(
    State(control): State<C>,
    Id(id): Id,
    Body(request): Body<Lifetime>,
) -> Result<StatusCode, Refusal> {
    /// Source: E2B's API.
    const DEFAULT_REFRESH_S: u64 = 60;
    let asked = Some(request.duration.unwrap_or(DEFAULT_REFRESH_S));
    let request = SetTimeout {
        timeout_s: Some(seconds("duration", asked)?),
        extend_only: true,
    };
    known(control.set_timeout(id.into(), request).await?)?;
    Ok(StatusCode::NO_CONTENT)
}

/// One fork: it, or why there is none.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Forked {
    Sandbox(Access),
    Error { code: u16, message: String },
}

pub(super) async fn fork<C: ControlPlane>(
    State(control): State<C>,
    Part(terms): Part<Terms>,
    Id(id): Id,
    Body(request): Body<Lifetime>,
) -> Result<(StatusCode, Json<Vec<Forked>>), Refusal> {
    let count = request.count.unwrap_or(1);
    if !(1..=MAX_FORKS).contains(&count) {
        let detail = format!("is {count}; 1 to {MAX_FORKS} are possible");
        return Err(bad("count", detail).into());
    }
    let request = ForkSandbox {
        count,
        timeout_s: Some(seconds("timeout", request.timeout)?),
    };
    settled(&control, &id).await?;
    let forks = control.fork(id.into(), request).await?;
    let forks = forks.into_iter().map(|fork| match fork {
        Ok(sandbox) => Forked::Sandbox(Access::new(sandbox, &terms)),
        Err(error) => Forked::Error {
            code: error.status().as_u16(),
            message: error.to_string(),
        },
    });
    Ok((StatusCode::CREATED, Json(forks.collect())))
}
