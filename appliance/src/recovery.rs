//! Carries out what [`reconcile`] decides, before the daemon takes any request.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use http_api::ids::SandboxId;
use http_api::wire::{EventKind, SandboxState};
use snapshot_format::BuildStore;

use crate::catalogue::{Catalogue, SandboxRow, builds, sandboxes};
use crate::config::Config;
use crate::events::{Events, Happened};
use crate::network::{SlotIndex, Slots, slots};
use crate::reconcile::{self, Decision};
use crate::sandbox::adoption::{Left, Memory, Record};
use crate::sandbox::snapshot::describe;
use crate::vmm::confinement::Confinement;

/// Brings the catalogue and the host together after whatever happened last time. Gives all sandboxes,
/// and the guests of those that are to be taken over.
///
/// # Errors
/// What could not be looked at or cleaned up.
pub async fn recover(
    config: &Config,
    catalogue: &Catalogue,
    store: &BuildStore,
    (slots, confinement): (&Slots, &Confinement),
    events: &Events,
) -> Result<Vec<(SandboxRow, Option<Left>)>> {
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
    let mut left: BTreeMap<SandboxId, Left> = rows
        .iter()
        .filter_map(|row| Some((row.id.clone(), find(config, row)?)))
        .collect();
    let plan = reconcile::plan(&rows, &unrecorded, &left.keys().cloned().collect());
    for (id, decision) in &plan {
        if *decision != Decision::TakeOver {
            left.remove(id);
        }
    }
    clean_up(config, &rows, &left, slots, confinement).await?;
    for (id, decision) in plan {
        let row = rows.iter().find(|row| row.id == id).cloned();
        if let Some(row) = row {
            apply(catalogue, store, events, row, decision).await?;
        }
    }
    let rows = catalogue
        .call(|connection| sandboxes::all(connection))
        .await?;
    let with_guest = |row: SandboxRow| {
        let left = left.remove(&row.id);
        (row, left)
    };
    Ok(rows.into_iter().map(with_guest).collect())
}

/// The guest that a sandbox has, if its VMM has outlived its daemon.
fn find(config: &Config, row: &SandboxRow) -> Option<Left> {
    let dir = config.run_dir.join("sandboxes").join(row.id.as_str());
    let record = Record::read(&dir)?;
    let namespace = crate::network::address::namespace(&config.instance, row.slot);
    let survivor = reconcile::process_in(&namespace, record.pid)?;
    Some(Left {
        survivor,
        record,
        memory: Memory::Whole,
    })
}

/// Removes what an earlier daemon has left on the host, but for what is to be taken over.
async fn clean_up(
    config: &Config,
    rows: &[SandboxRow],
    left: &BTreeMap<SandboxId, Left>,
    slots: &Slots,
    confinement: &Confinement,
) -> Result<()> {
    let pids: Vec<i32> = left.values().map(|left| left.survivor.pid).collect();
    let groups = confinement
        .end_left_over(&pids)
        .context("Ending left-over VMMs by their control groups")?;
    if groups > 0 {
        tracing::warn!(groups, "Removed the control groups of an earlier run");
    }
    let kept_slots: BTreeSet<SlotIndex> = rows
        .iter()
        .filter(|row| left.contains_key(&row.id))
        .map(|row| row.slot)
        .collect();
    for slot in slots::existing(&config.instance).context("Looking for slots")? {
        if kept_slots.contains(&slot) {
            continue;
        }
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
    let kept: BTreeSet<String> = left.keys().map(ToString::to_string).collect();
    // After their VMMs have ended, and before their files go.
    let devices = crate::disks::remove_left_over(&config.instance, &config.data_dir, &kept)
        .context("Removing the disks of an earlier run")?;
    if devices > 0 {
        tracing::warn!(devices, "Removed the disks of an earlier run");
    }
    for dir in [
        config.data_dir.join("sandboxes"),
        config.run_dir.join("sandboxes"),
        config.run_dir.join(crate::vmm::ready::DIRECTORY),
    ] {
        reconcile::empty_dir(&dir, &kept).with_context(|| format!("Emptying {}", dir.display()))?;
    }
    Ok(())
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
        Decision::Keep | Decision::TakeOver => return Ok(()),
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
