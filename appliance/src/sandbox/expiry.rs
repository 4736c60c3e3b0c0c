//! An owner and its sandbox's time: changing it, waiting for its end, and ending it.

use std::time::Duration;

use http_api::ApiError;
use http_api::wire::{OnTimeout, Sandbox, SandboxState, SetTimeout};
use tokio::time::sleep;

use super::cell::Cell;
use super::owner::Owner;
use super::state::{Denied, Operation};
use crate::catalogue::sandboxes;
use crate::clock::now_ms;

/// The wall clock is looked at at least this often: it may be set.
const LOOK: Duration = Duration::from_secs(60);
/// After how long a pause that failed is tried again, in milliseconds.
const AGAIN_MS: u64 = 30_000;

/// Ready when a sandbox that runs has run long enough.
pub(super) async fn time_is_up(cell: &Cell) {
    loop {
        let Some(at) = cell.lifetime().expires_at_ms else {
            // Whoever sets an end asks the owner, who then waits anew.
            return std::future::pending().await;
        };
        let left = at.saturating_sub(now_ms());
        if left == 0 {
            return;
        }
        sleep(LOOK.min(Duration::from_millis(left))).await;
    }
}

impl Owner {
    /// Stored first, so that a crash doesn't bring the old end back.
    pub(super) async fn set_timeout(&mut self, request: SetTimeout) -> Result<Sandbox, ApiError> {
        if self.cell.state() == SandboxState::Failed {
            return Err(Denied::Failed.into());
        }
        let mut row = self.cell.row();
        row.lifetime.set(request, self.live.is_some(), now_ms());
        let lifetime = row.lifetime;
        let put = move |connection: &mut rusqlite::Connection| sandboxes::put(connection, &row);
        let stored = self.host.catalogue.call(put).await;
        stored.map_err(|error| ApiError::failed("catalogue_failed", &error))?;
        self.cell.update(|row| row.lifetime = lifetime);
        Ok(self.cell.view())
    }

    /// Ends it as was asked; whether nothing of it is left.
    pub(super) async fn expire(&mut self) -> bool {
        let id = self.cell.row().id;
        let on_timeout = self.cell.lifetime().on_timeout;
        let operation = match on_timeout {
            OnTimeout::Kill => Operation::Destroy,
            OnTimeout::Pause => Operation::Pause,
        };
        if self.cell.begin(operation).is_err() {
            // A request was faster; its job is on the way.
            sleep(Duration::from_millis(10)).await;
            return false;
        }
        tracing::info!(sandbox_id = %id, ?on_timeout, "Its time is up");
        self.host.metrics.expired.inc();
        if on_timeout == OnTimeout::Kill {
            self.destroy("Its time was up").await;
            return true;
        }
        if let Err(error) = self.pause().await {
            tracing::warn!(sandbox_id = %id, %error, "It was not paused; it is tried again");
            self.cell
                .update(|row| row.lifetime.postpone(AGAIN_MS, now_ms()));
        }
        false
    }
}
