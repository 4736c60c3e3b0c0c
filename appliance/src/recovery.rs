//! Carries out what [`reconcile`] decides, before the daemon takes any request.

use anyhow::{Context, Result};
use http_api::wire::{EventKind, SandboxState};
use snapshot_format::BuildStore;

use crate::catalogue::{Catalogue, SandboxRow, builds, sandboxes};
use crate::config::Config;
use crate::events::{Events, Happened};
use crate::network::{Slots, slots};
use crate::reconcile::{self, Decision};
use crate::sandbox::snapshot::describe;

/// Brings the catalogue and the host together after whatever happened last time.
///
/// # Errors
/// What could not be looked at or cleaned up.
pub async fn recover(
    config: &Config,
    catalogue: &Catalogue,
    store: &BuildStore,
    slots: &Slots,
    events: &Events,
) -> Result<Vec<SandboxRow>> {
    for slot in slots::existing(&config.instance).context("Looking for slots")? {
        let name = crate::network::address::namespace(&config.instance, slot);
        let ended = reconcile::end_processes_in(&name).context("Ending left-over VMMs")?;
        slots
            .take_down(slot)
            .await
            .context("Removing a left-over slot")?;
        tracing::warn!(
            slot = slot.0,
            processes = ended,
            "Removed what an earlier run left"
        );
    }
    // After their VMMs have ended, and before their files go.
    let devices = crate::disks::remove_left_over(&config.instance, &config.data_dir)
        .context("Removing the disks of an earlier run")?;
    if devices > 0 {
        tracing::warn!(devices, "Removed the disks of an earlier run");
    }
    for dir in [
        config.data_dir.join("sandboxes"),
        config.run_dir.join("sandboxes"),
        config.run_dir.join(crate::vmm::ready::DIRECTORY),
    ] {
        reconcile::empty_dir(&dir).with_context(|| format!("Emptying {}", dir.display()))?;
    }
    let unfinished = store
        .remove_staging()
        .context("Removing unfinished builds")?;
    if !unfinished.is_empty() {
        tracing::warn!(
            count = unfinished.len(),
            "Removed builds that were never finished"
        );
    }

    let rows = catalogue
        .call(|connection| sandboxes::all(connection))
        .await?;
    let known = catalogue
        .call(|connection| builds::all_ids(connection))
        .await?;
    let unrecorded = reconcile::find_unrecorded(store, |id| known.contains(&id))
        .context("Looking for builds that were not recorded")?;
    for (id, decision) in reconcile::plan(&rows, &unrecorded) {
        let row = rows.iter().find(|row| row.id == id).cloned();
        if let Some(row) = row {
            apply(catalogue, store, events, row, decision).await?;
        }
    }
    Ok(catalogue
        .call(|connection| sandboxes::all(connection))
        .await?)
}

async fn apply(
    catalogue: &Catalogue,
    store: &BuildStore,
    events: &Events,
    mut row: SandboxRow,
    decision: Decision,
) -> Result<()> {
    let id = row.id.clone();
    let mut happened = Happened {
        kind: EventKind::State,
        sandbox: id.to_string(),
        state: None,
        execution_id: row.execution_id.clone(),
        reason: None,
    };
    let mut build = None;
    match decision {
        Decision::Keep => return Ok(()),
        Decision::Forget => {
            tracing::warn!(sandbox_id = %id, state = %row.state, "Forgot a half-made sandbox");
            catalogue
                .call(move |connection| sandboxes::remove(connection, &id))
                .await?;
            happened.kind = EventKind::Deleted;
            happened.reason = Some("The daemon ended while it was made or removed".into());
            events.tell(happened);
            return Ok(());
        }
        Decision::StillPaused => row.enter(SandboxState::Paused, crate::clock::now_ms()),
        Decision::Paused(published) => {
            row.enter(SandboxState::Paused, crate::clock::now_ms());
            row.build = Some(published.id);
            build = Some(describe(store, published.id, published.stored_pages)?);
        }
        Decision::Fail(reason) => {
            row.state = SandboxState::Failed;
            row.reason = Some(reason.to_owned());
        }
    }
    tracing::warn!(sandbox_id = %row.id, state = %row.state, reason = row.reason, "Recovered");
    happened.state = Some(row.state);
    happened.reason = row.reason.clone();
    let store_it = move |connection: &mut rusqlite::Connection| match &build {
        Some(build) => builds::put_with_sandbox(connection, build, &row),
        None => sandboxes::put(connection, &row),
    };
    catalogue.call(store_it).await?;
    events.tell(happened);
    Ok(())
}
