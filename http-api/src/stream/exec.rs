//! `/v1/sandboxes/{id}/exec/stream`: a command that ends with its connection.
//!
//! ```text
//!   client                                      host
//!     {"type":"start","cmd","args",…} ────────▶
//!                                     ◀──────── {"type":"start","pid"}
//!                                     ◀──────── {"type":"stdout"|"stderr","data"}, any number
//!     {"type":"stop"}, if at all      ────────▶
//!                                     ◀──────── {"type":"exit","exit_code"} or {"type":"error","data"}
//! ```

use std::collections::BTreeMap;

use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::text::Pieces;
use super::{PING, Said, close, first, must_run, receive, send, upgraded};
use crate::control_plane::ControlPlane;
use crate::ids::SandboxId;
use crate::options::Place;
use crate::problem::ApiError;
use crate::processes::{ProcessStream, Processes};
use crate::routes::{Segment, name};
use crate::wire::process::{ProcessOutput, Signal, StartProcess, Which};

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Request {
    Start {
        cmd: String,
        #[serde(default)]
        args: Vec<String>,
        #[serde(default)]
        env: BTreeMap<String, String>,
        cwd: Option<String>,
        user: Option<String>,
        timeout_ms: Option<u64>,
    },
    Stop,
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Answer {
    Start { pid: u32 },
    Stdout { data: String },
    Stderr { data: String },
    Exit { exit_code: i32 },
    Error { data: String },
}

fn error(data: impl Into<String>) -> Answer {
    Answer::Error { data: data.into() }
}

pub(crate) async fn exec<C: ControlPlane + Processes>(
    State(control): State<C>,
    Segment(id): Segment,
    place: Place,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let id = name("id", &id)?;
    must_run(&control, &id).await?;
    let upgrade = upgraded(upgrade)?;
    Ok(upgrade.on_upgrade(move |mut socket| async move {
        command(&control, id, &mut socket).await;
        close(socket).await;
        drop(place);
    }))
}

/// What the client asks for first, to its end. It ends with the connection, too.
pub(crate) async fn command<C: Processes>(control: &C, id: SandboxId, socket: &mut WebSocket) {
    let process = match first::<Request>(socket).await {
        Said::Message(Request::Start {
            cmd,
            args,
            env,
            cwd,
            user,
            timeout_ms,
        }) if !cmd.is_empty() => StartProcess {
            cmd,
            args,
            env,
            cwd,
            user,
            timeout_ms,
            ..StartProcess::default()
        },
        Said::Gone => return,
        Said::Nonsense(reason) => {
            let data = format!("The first message must be `start` with a `cmd`: {reason}");
            send(socket, &error(data)).await;
            return;
        }
        Said::Message(_) | Said::Bytes(_) => {
            send(
                socket,
                &error("The first message must be `start` with a `cmd`"),
            )
            .await;
            return;
        }
    };
    let output = match control.start(id.clone(), process).await {
        Ok(output) => output,
        Err(refused) => {
            send(socket, &error(refused.to_string())).await;
            return;
        }
    };
    if let Some(pid) = relay(control, id.clone(), socket, output).await {
        stop(control, id, Some(pid)).await;
    }
}

/// What a process says, to its end or the client's. It goes on without its client.
pub(crate) async fn listen<C: Processes>(
    control: &C,
    id: SandboxId,
    socket: &mut WebSocket,
    output: ProcessStream,
) {
    relay(control, id, socket, output).await;
}

/// Passes on what a process says; returns its number if it runs still when nobody listens any more.
async fn relay<C: Processes>(
    control: &C,
    id: SandboxId,
    socket: &mut WebSocket,
    mut output: ProcessStream,
) -> Option<u32> {
    let mut pid = None;
    let (mut stdout, mut stderr) = (Pieces::default(), Pieces::default());
    let mut ping = interval_at(Instant::now() + PING, PING);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let there = tokio::select! {
            said = output.next() => {
                let answers = match said {
                    Some(ProcessOutput::Started { pid: started }) => {
                        pid = Some(started);
                        vec![Answer::Start { pid: started }]
                    }
                    Some(ProcessOutput::Stdout(bytes) | ProcessOutput::Terminal(bytes)) => {
                        vec![Answer::Stdout { data: stdout.push(&bytes) }]
                    }
                    Some(ProcessOutput::Stderr(bytes)) => {
                        vec![Answer::Stderr { data: stderr.push(&bytes) }]
                    }
                    Some(ProcessOutput::Exit { exit_code, .. }) => vec![
                        Answer::Stdout { data: stdout.finish() },
                        Answer::Stderr { data: stderr.finish() },
                        Answer::Exit { exit_code },
                    ],
                    Some(ProcessOutput::Lost(reason)) => vec![error(reason)],
                    None => vec![error("The command's output ended before the command")],
                };
                let ended = matches!(answers.last(), Some(Answer::Exit { .. } | Answer::Error { .. }));
                for answer in answers {
                    let empty = matches!(
                        &answer,
                        Answer::Stdout { data } | Answer::Stderr { data } if data.is_empty()
                    );
                    if !empty && !send(socket, &answer).await {
                        return pid;
                    }
                }
                if ended {
                    return None;
                }
                true
            }
            said = receive::<Request>(socket) => match said {
                Said::Message(Request::Stop) => {
                    // Its end is told as that of any other.
                    stop(control, id.clone(), pid).await;
                    true
                }
                Said::Message(Request::Start { .. }) => {
                    send(socket, &error("A connection runs one command")).await;
                    false
                }
                Said::Bytes(_) => {
                    send(socket, &error("Messages are JSON texts")).await;
                    false
                }
                Said::Nonsense(reason) => {
                    send(socket, &error(reason)).await;
                    false
                }
                Said::Gone => false,
            },
            _ = ping.tick() => socket.send(Message::Ping(Vec::new().into())).await.is_ok(),
        };
        if !there {
            return pid;
        }
    }
}

async fn stop<C: Processes>(control: &C, id: SandboxId, pid: Option<u32>) {
    if let Some(pid) = pid {
        // It may have ended by itself.
        let _ = control.signal(id, Which::Pid(pid), Signal::Kill).await;
    }
}
