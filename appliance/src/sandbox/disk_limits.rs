//! How much a sandbox may do with its disk: at once if it runs, else from its next resume on.

use http_api::problem::ApiError;
use http_api::wire::{DiskLimits, Sandbox, SandboxState};

use super::owner::Owner;
use super::state::Denied;
use crate::vmm::VmmError;

impl Owner {
    /// Stored first: after a crash in between, the next resume applies them.
    pub(super) async fn limit_disk(&mut self, limits: DiskLimits) -> Result<Sandbox, ApiError> {
        let state = self.cell.state();
        if state == SandboxState::Failed {
            return Err(Denied::Failed.into());
        }
        let before = self.cell.row().disk_limits;
        self.store_change(|row| row.disk_limits = limits).await?;
        let Some(live) = self.live.as_mut() else {
            return Ok(self.cell.view());
        };
        let of_both = self.host.disk_limits.with(limits);
        match live.machine.limit_disk(of_both).await {
            Ok(()) => Ok(self.cell.view()),
            Err(error) => {
                self.store_change(|row| row.disk_limits = before).await?;
                Err(refusal(&error, state))
            }
        }
    }
}

fn refusal(error: &VmmError, state: SandboxState) -> ApiError {
    match error {
        VmmError::NotWhileRunning { .. } => ApiError::Denied {
            state,
            detail: format!("{error}: limits that it is given then hold when it is resumed"),
        },
        error => ApiError::failed("vmm_failed", error),
    }
}
