//! `/v1/sandboxes/{id}/pty`: a terminal. It goes on without its connection, and is found again by
//! its tag.
//!
//! ```text
//!   client                                             host
//!     {"type":"start","cols","rows","cmd"?,…}
//!        or {"type":"connect","tag"}         ────────▶
//!                                            ◀──────── {"type":"started","pid","tag"}
//!     {"type":"input","data":base64}         ────────▶
//!        or the bytes as they are
//!     {"type":"resize","cols","rows"}        ────────▶
//!                                            ◀──────── {"type":"output","data":base64}
//!     {"type":"kill"}, if at all             ────────▶
//!                                            ◀──────── {"type":"exit","exit_code"} or {"type":"error","data"}
//! ```
//!
//! To clients that want that, output goes as it is, too, in binary messages.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval_at};

use super::{PING, Said, close, first, fresh, must_run, receive, send, upgraded};
use crate::control_plane::ControlPlane;
use crate::ids::SandboxId;
use crate::options::Place;
use crate::problem::ApiError;
use crate::processes::{ProcessStream, Processes};
use crate::routes::{Segment, name};
use crate::wire::process::{ProcessOutput, Signal, StartProcess, TerminalSize, Which};

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Request {
    Start {
        #[serde(default = "shell")]
        cmd: String,
        args: Option<Vec<String>>,
        #[serde(default, alias = "envs")]
        env: BTreeMap<String, String>,
        cwd: Option<String>,
        user: Option<String>,
        cols: u16,
        rows: u16,
        tag: Option<String>,
    },
    Connect {
        tag: String,
    },
    Input {
        data: String,
    },
    Resize {
        cols: u16,
        rows: u16,
    },
    Kill,
    /// The answer to a ping that wants one.
    Pong,
}

const NO_START: &str = "The first message must be `start` or `connect`";

fn shell() -> String {
    "/bin/bash".to_owned()
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Answer {
    Started {
        pid: u32,
        tag: String,
    },
    Output {
        data: String,
    },
    Exit {
        exit_code: i32,
    },
    /// Always the last.
    Error {
        data: String,
        fatal: bool,
    },
    Ping,
}

pub(crate) async fn pty<C: ControlPlane + Processes>(
    State(control): State<C>,
    Segment(id): Segment,
    place: Place,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let id = name("id", &id)?;
    must_run(&control, &id).await?;
    let upgrade = upgraded(upgrade)?;
    Ok(upgrade.on_upgrade(move |mut socket| async move {
        terminal(&control, id, &mut socket, Bytes::Coded).await;
        close(socket).await;
        drop(place);
    }))
}

/// How a terminal's bytes travel to the client. From there they may come either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bytes {
    /// In messages, as base64.
    Coded,
    /// As they are, in binary messages.
    Raw,
}

/// Until the process ends or the client goes; an error ends it, too, and is told.
pub(crate) async fn terminal<C: Processes>(
    control: &C,
    id: SandboxId,
    socket: &mut WebSocket,
    bytes: Bytes,
) {
    if let Err(data) = run(control, id, socket, bytes).await {
        send(socket, &Answer::Error { data, fatal: true }).await;
    }
}

async fn run<C: Processes>(
    control: &C,
    id: SandboxId,
    socket: &mut WebSocket,
    bytes: Bytes,
) -> Result<(), String> {
    let (tag, mut output) = match first::<Request>(socket).await {
        Said::Message(request) => begin(control, id.clone(), request).await?,
        Said::Bytes(_) => return Err(NO_START.to_owned()),
        Said::Nonsense(reason) => return Err(reason),
        Said::Gone => return Ok(()),
    };
    let which = Which::Tag(tag.clone());
    let mut ping = interval_at(tokio::time::Instant::now() + PING, PING);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let answer = tokio::select! {
            said = output.next() => match said {
                Some(ProcessOutput::Started { pid }) => Answer::Started { pid, tag: tag.clone() },
                Some(
                    ProcessOutput::Terminal(said)
                    | ProcessOutput::Stdout(said)
                    | ProcessOutput::Stderr(said),
                ) => match bytes {
                    Bytes::Coded => Answer::Output { data: STANDARD.encode(said) },
                    Bytes::Raw => {
                        if socket.send(Message::Binary(said.into())).await.is_err() {
                            return Ok(());
                        }
                        continue;
                    }
                },
                Some(ProcessOutput::Exit { exit_code, .. }) => {
                    send(socket, &Answer::Exit { exit_code }).await;
                    return Ok(());
                }
                Some(ProcessOutput::Lost(reason)) => return Err(reason),
                None => return Err("The terminal's output ended before the process".to_owned()),
            },
            said = receive::<Request>(socket) => {
                let said = match said {
                    Said::Message(request) => request,
                    Said::Bytes(typed) => {
                        let typed = control.input(id.clone(), which.clone(), true, typed).await;
                        typed.map_err(|refused| refused.to_string())?;
                        continue;
                    }
                    Said::Nonsense(reason) => return Err(reason),
                    Said::Gone => return Ok(()),
                };
                act(control, id.clone(), which.clone(), said).await?;
                continue;
            }
            _ = ping.tick() => Answer::Ping,
        };
        if !send(socket, &answer).await {
            return Ok(());
        }
    }
}

async fn begin<C: Processes>(
    control: &C,
    id: SandboxId,
    request: Request,
) -> Result<(String, ProcessStream), String> {
    let (tag, output) = match request {
        Request::Start {
            cmd,
            args,
            env,
            cwd,
            user,
            cols,
            rows,
            tag,
        } => {
            let interactive = || vec!["-i".to_owned(), "-l".to_owned()];
            let args = args.unwrap_or_else(|| {
                if cmd == shell() {
                    interactive()
                } else {
                    vec![]
                }
            });
            let tag = tag.unwrap_or_else(|| format!("pty-{}", fresh()));
            let process = StartProcess {
                cmd,
                args,
                env,
                cwd,
                user,
                terminal: Some(TerminalSize { cols, rows }),
                tag: Some(tag.clone()),
                ..StartProcess::default()
            };
            (tag, control.start(id, process).await)
        }
        Request::Connect { tag } => {
            let found = control.find(id, Which::Tag(tag.clone())).await;
            (tag, found)
        }
        _ => return Err(NO_START.to_owned()),
    };
    Ok((tag, output.map_err(|refused| refused.to_string())?))
}

async fn act<C: Processes>(
    control: &C,
    id: SandboxId,
    which: Which,
    request: Request,
) -> Result<(), String> {
    let done = match request {
        Request::Input { data } => {
            let bytes = STANDARD.decode(data).map_err(|e| format!("data: {e}"))?;
            control.input(id, which, true, bytes).await
        }
        Request::Resize { cols, rows } => {
            control.resize(id, which, TerminalSize { cols, rows }).await
        }
        // Its end is told as that of any other.
        Request::Kill => control.signal(id, which, Signal::Kill).await,
        Request::Pong => return Ok(()),
        Request::Start { .. } | Request::Connect { .. } => {
            return Err("A connection has one terminal".to_owned());
        }
    };
    done.map_err(|refused| refused.to_string())
}
