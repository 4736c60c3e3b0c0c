//! `POST /snapshot/freeze` and `/snapshot/thaw`: stopping all processes that clients have started
//! for a moment, so that nothing changes while the guest is snapshotted.
//!
//! A freeze ends by itself after `?timeout_ms=` (counted while the guest runs), so a host that is
//! gone, or forgets, leaves no guest that never moves again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;

use crate::freezer::FreezeError;
use crate::prepare::timeout;
use crate::refusal::Refusal;
use crate::routes::Guest;

/// How long a freeze lasts unless the request says otherwise.
const USUAL_MS: u64 = 30_000;
/// How long processes may take to stop.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often processes were frozen or thawed: a freeze is ended only by its own timer.
#[derive(Debug, Default)]
pub(crate) struct Turns(AtomicU64);

impl Turns {
    fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn is_current(&self, turn: u64) -> bool {
        self.0.load(Ordering::Relaxed) == turn
    }
}

/// Stops them; 204 when all have.
pub(crate) async fn freeze(
    State(guest): State<Arc<Guest>>,
    RawQuery(query): RawQuery,
    body: Bytes,
) -> Result<StatusCode, Refusal> {
    let lasts = timeout(query.as_deref(), &body, USUAL_MS)?;
    let turn = guest.turns.next();
    let freezing = Arc::clone(&guest);
    let frozen = tokio::task::spawn_blocking(move || freezing.freezer.freeze(PATIENCE)).await;
    frozen
        .map_err(|e| Refusal::failed("Freezing", &std::io::Error::other(e)))?
        .map_err(|e| refused(&e))?;
    tokio::spawn(async move {
        tokio::time::sleep(lasts).await;
        if guest.turns.is_current(turn)
            && let Err(error) = guest.freezer.thaw()
        {
            eprintln!("envd: Ending a freeze: {error}");
        }
    });
    Ok(StatusCode::NO_CONTENT)
}

/// Lets them go on; 204 also when none was stopped.
pub(crate) async fn thaw(State(guest): State<Arc<Guest>>) -> Result<StatusCode, Refusal> {
    guest.turns.next();
    guest.freezer.thaw().map_err(|e| refused(&e))?;
    Ok(StatusCode::NO_CONTENT)
}

fn refused(error: &FreezeError) -> Refusal {
    let status = match error {
        FreezeError::Unavailable => StatusCode::NOT_IMPLEMENTED,
        FreezeError::Slow(_) => StatusCode::GATEWAY_TIMEOUT,
        FreezeError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let source = std::error::Error::source(error);
    Refusal {
        status,
        message: source.map_or_else(|| error.to_string(), |source| format!("{error}: {source}")),
    }
}
