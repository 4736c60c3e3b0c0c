//! Commands, in the foreground and behind it.

use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use futures_util::StreamExt;

use super::capsules::touch;
use super::refusal::{Body, Id, IdAndPid, Refusal, bad};
use super::wire::{Exec, Executed, Processes as Listed};
use crate::control_plane::ControlPlane;
use crate::ids::SandboxId;
use crate::problem::ApiError;
use crate::processes::Processes;
use crate::stream::fresh;
use crate::wire::ExecRequest;
use crate::wire::process::{ProcessOutput, Signal, StartProcess, Which};

/// How long a command may take when a request doesn't say, in seconds. Source: Wrenn's API.
const DEFAULT_TIMEOUT_S: u64 = 30;

pub(super) async fn exec<C: ControlPlane + Processes>(
    State(control): State<C>,
    Id(id): Id,
    Body(request): Body<Exec>,
) -> Result<(StatusCode, Json<Executed>), Refusal> {
    if request.cmd.is_empty() {
        return Err(bad("cmd", "is empty").into());
    }
    touch(&control, &id).await?;
    let answer = if request.background {
        let runs = begin(&control, id.clone(), request).await?;
        (StatusCode::ACCEPTED, Json(runs))
    } else {
        let ended = run(&control, id.clone(), request).await?;
        (StatusCode::OK, Json(ended))
    };
    // It was busy until now. That it is gone meanwhile doesn't change what the command said.
    let _ = touch(&control, &id).await;
    Ok(answer)
}

async fn run<C: ControlPlane>(
    control: &C,
    id: SandboxId,
    request: Exec,
) -> Result<Executed, ApiError> {
    let timeout_s = request.timeout_sec.unwrap_or(DEFAULT_TIMEOUT_S);
    let started = Instant::now();
    let wanted = ExecRequest {
        cmd: request.cmd.clone(),
        args: request.args,
        env: request.envs.unwrap_or_default(),
        cwd: request.cwd,
        user: None,
        timeout_ms: timeout_s.saturating_mul(1000).min(u64::from(u32::MAX)),
    };
    let result = control.exec(id.clone(), wanted).await?;
    Ok(Executed::Ended {
        sandbox_id: id.to_string(),
        cmd: request.cmd,
        stdout: result.stdout,
        stderr: result.stderr,
        exit_code: result.exit_code,
        duration_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        encoding: "utf-8",
    })
}

/// It goes on by itself, and is found again by its number or its tag.
async fn begin<C: Processes>(
    control: &C,
    id: SandboxId,
    request: Exec,
) -> Result<Executed, ApiError> {
    let tag = request.tag.unwrap_or_else(|| format!("proc-{}", fresh()));
    let process = StartProcess {
        cmd: request.cmd.clone(),
        args: request.args,
        env: request.envs.unwrap_or_default(),
        cwd: request.cwd,
        tag: Some(tag.clone()),
        ..StartProcess::default()
    };
    let mut output = control.start(id.clone(), process).await?;
    let detail = match output.next().await {
        Some(ProcessOutput::Started { pid }) => {
            return Ok(Executed::Runs {
                sandbox_id: id.to_string(),
                cmd: request.cmd,
                pid,
                tag,
            });
        }
        Some(ProcessOutput::Lost(reason)) => reason,
        _ => "The guest did not say which process it started".to_owned(),
    };
    let code = "guest_failed";
    Err(ApiError::Failed { code, detail })
}

pub(super) async fn list<C: Processes>(
    State(control): State<C>,
    Id(id): Id,
) -> Result<Json<Listed>, Refusal> {
    let processes = control.processes(id).await?.into_iter();
    let processes = processes.map(Into::into).collect();
    Ok(Json(Listed { processes }))
}

pub(super) async fn kill<C: Processes>(
    State(control): State<C>,
    IdAndPid(id, pid): IdAndPid,
) -> Result<StatusCode, Refusal> {
    control.signal(id, which(pid), Signal::Kill).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A process by its number, or by the tag that it was started with.
pub(super) fn which(text: String) -> Which {
    text.parse().map_or_else(|_| Which::Tag(text), Which::Pid)
}
