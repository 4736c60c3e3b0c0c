//! Which ports the guest's processes listen on, so that the host can refuse traffic to others.
//!
//! Nothing looks while nobody asks. While somebody listens to the events, we look soon after a
//! process was started and otherwise at growing intervals, up to [`SLOWEST`].

mod listening;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use serde::Serialize;

use self::listening::Port;
use crate::refusal::{Refusal, json};
use crate::routes::Guest;

/// Between two looks when things are happening.
const FASTEST: Duration = Duration::from_millis(50);
/// Between two looks when nothing has happened for long.
const SLOWEST: Duration = Duration::from_secs(2);

/// All ports at one moment: the answer, and each of the events.
#[derive(Debug, Serialize)]
struct Ports<'a> {
    ports: &'a [Port],
}

/// `GET /ports`: the ports now.
pub(crate) async fn ports(State(guest): State<Arc<Guest>>) -> Result<Response, Refusal> {
    let ports = look(&guest).map_err(|e| Refusal::failed("Reading the listening ports", &e))?;
    Ok(json(StatusCode::OK, &Ports { ports: &ports }))
}

/// `GET /ports/events`: a line of JSON with all ports, now and whenever they have changed. An
/// event that is lost with its connection is made up for by the first one of the next.
pub(crate) async fn events(State(guest): State<Arc<Guest>>) -> Response {
    let watcher = Watcher {
        guest,
        told: None,
        pause: FASTEST,
    };
    let lines = stream::unfold(watcher, |mut watcher| async move {
        let line = watcher.next().await;
        Some((line, watcher))
    });
    let headers = [(header::CONTENT_TYPE, "application/x-ndjson")];
    (headers, Body::from_stream(lines)).into_response()
}

struct Watcher {
    guest: Arc<Guest>,
    told: Option<Vec<Port>>,
    pause: Duration,
}

impl Watcher {
    /// The next change.
    async fn next(&mut self) -> io::Result<Bytes> {
        loop {
            let started = self.guest.processes.next_start();
            let ports = look(&self.guest)?;
            if self.told.as_ref() != Some(&ports) {
                let mut line = serde_json::to_vec(&Ports { ports: &ports })?;
                line.push(b'\n');
                self.told = Some(ports);
                self.pause = FASTEST;
                return Ok(line.into());
            }
            tokio::select! {
                () = started => {
                    self.pause = FASTEST;
                    tokio::time::sleep(FASTEST).await;
                }
                () = tokio::time::sleep(self.pause) => {
                    self.pause = (self.pause * 2).min(SLOWEST);
                }
            }
        }
    }
}

/// Two files of the kernel, which never block.
fn look(guest: &Guest) -> io::Result<Vec<Port>> {
    let read = |path: &str| match std::fs::read_to_string(path) {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read,
    };
    let (four, six) = (read("/proc/net/tcp")?, read("/proc/net/tcp6")?);
    Ok(listening::ports(&four, &six, guest.port))
}
