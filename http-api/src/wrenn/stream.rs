//! Commands and terminals over WebSockets: the native ones', and what differs in how terminals
//! speak.

use axum::extract::State;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::response::Response;

use super::capsules::touch;
use super::processes::which;
use super::refusal::{Id, IdAndPid, Part, Refusal};
use crate::control_plane::ControlPlane;
use crate::options::Place;
use crate::processes::Processes;
use crate::stream::{close, exec, must_run, pty, upgraded};

type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;

pub(super) async fn exec<C: ControlPlane + Processes>(
    State(control): State<C>,
    Id(id): Id,
    Part(place): Part<Place>,
    upgrade: Upgrade,
) -> Result<Response, Refusal> {
    must_run(&control, &id).await?;
    touch(&control, &id).await?;
    Ok(upgraded(upgrade)?.on_upgrade(move |mut socket| async move {
        exec::command(&control, id.clone(), &mut socket).await;
        let _ = touch(&control, &id).await;
        close(socket).await;
        drop(place);
    }))
}

/// What a process says that runs already. It goes on without its listener.
pub(super) async fn process<C: ControlPlane + Processes>(
    State(control): State<C>,
    IdAndPid(id, pid): IdAndPid,
    Part(place): Part<Place>,
    upgrade: Upgrade,
) -> Result<Response, Refusal> {
    must_run(&control, &id).await?;
    let output = control.find(id.clone(), which(pid)).await?;
    Ok(upgraded(upgrade)?.on_upgrade(move |mut socket| async move {
        exec::listen(&control, id, &mut socket, output).await;
        close(socket).await;
        drop(place);
    }))
}

pub(super) async fn pty<C: ControlPlane + Processes>(
    State(control): State<C>,
    Id(id): Id,
    Part(place): Part<Place>,
    upgrade: Upgrade,
) -> Result<Response, Refusal> {
    must_run(&control, &id).await?;
    touch(&control, &id).await?;
    Ok(upgraded(upgrade)?.on_upgrade(move |mut socket| async move {
        pty::terminal(&control, id.clone(), &mut socket, pty::Bytes::Raw).await;
        let _ = touch(&control, &id).await;
        close(socket).await;
        drop(place);
    }))
}
