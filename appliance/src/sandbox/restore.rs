//! A sandbox from a build: check it, give the VMM its device state and an engine that
//! serves its memory, let it go on.

use std::sync::Arc;
use std::time::Instant;

use snapshot_format::BuildId;
use uffd_engine::PageStates;

use super::OperationError;
use super::boot::introduce;
use super::live::{Live, Session, give_back, make_place};
use crate::catalogue::{BuildRow, SandboxRow, builds};
use crate::disks::Source;
use crate::engines::Wanted;
use crate::guest::Guest;
use crate::host::Host;
use crate::integrity::{self, Checked};
use crate::vmm::Machine;

#[derive(Default)]
struct Parts {
    machine: Option<Box<dyn Machine>>,
    session: Option<Session>,
}

/// Restores a guest; on failure nothing of it is left, and the build is untouched.
pub(super) async fn restore(
    host: &Arc<Host>,
    row: &SandboxRow,
    build: BuildId,
) -> Result<Live, OperationError> {
    let mut parts = Parts::default();
    let result = try_restore(host, row, build, &mut parts).await;
    let Parts { machine, session } = parts;
    let live = machine.map(|machine| Live { machine, session });
    match (result, live) {
        (Ok(()), Some(live)) => Ok(live),
        (result, live) => {
            give_back(host, row, live).await;
            Err(result.err().unwrap_or(OperationError::Worker))
        }
    }
}

async fn try_restore(
    host: &Arc<Host>,
    row: &SandboxRow,
    build: BuildId,
    parts: &mut Parts,
) -> Result<(), OperationError> {
    let started = Instant::now();
    let checked = check(host, build).await?;
    let checked_at = started.elapsed();
    let disk = Source::Build(host.store.path(&build));
    let (place, slot) = make_place(host, row, disk).await?;
    let placed_at = started.elapsed();

    let states = PageStates::create(checked.build.map().memory_pages()).map_err(|source| {
        OperationError::File {
            operation: "Making the page-state table".into(),
            source,
        }
    })?;
    let states = Arc::new(states);
    let handoff = place.run_dir.join("uffd.sock");
    let session = format!("{}-{build}", row.id);
    let (expected, events) = host.engines.expect(Wanted {
        session: &session,
        store: host.store.root(),
        build,
        states: states.clone(),
        socket: &handoff,
        deadline: host.boot_timeout,
    })?;
    // The VMM hands its memory over while it starts: both go on together, and the failure
    // of either calls the other off.
    let restored = async {
        let restored = host
            .driver
            .restore(&row.shape, &place, checked.vmstate, &handoff);
        restored.await.map_err(OperationError::from)
    };
    let attached = async { expected.attached().await.map_err(OperationError::from) };
    let (machine, attachment) = tokio::try_join!(restored, attached)?;
    parts.session = Some(Session {
        attachment,
        states,
        events,
    });
    let machine = parts.machine.insert(machine);
    machine.go_on().await?;
    let running_at = started.elapsed();
    introduce(host, row, &Guest::at(slot.address), machine.as_ref()).await?;
    tracing::info!(
        sandbox_id = %row.id,
        build_id = %build,
        slot = row.slot.0,
        pid = machine.pid(),
        checked_us = checked_at.as_micros() as u64,
        placed_us = placed_at.as_micros() as u64,
        running_us = running_at.as_micros() as u64,
        answered_us = started.elapsed().as_micros() as u64,
        "Restored"
    );
    Ok(())
}

/// Checks a build off the shard's thread, and remembers what was found right.
async fn check(host: &Arc<Host>, build: BuildId) -> Result<Checked, OperationError> {
    let known = host.identities(build).await?;
    let store = host.store.clone();
    let checking = tokio::task::spawn_blocking(move || {
        integrity::check(&store, build, |id| known.get(&id).cloned())
    });
    let checked = checking.await.map_err(|_| OperationError::Worker)??;
    for (id, identity) in &checked.verified {
        let (id, identity) = (*id, identity.clone());
        let remember = move |connection: &mut rusqlite::Connection| {
            let Some(row) = builds::get(connection, id)? else {
                return Ok(());
            };
            builds::put(connection, &BuildRow { identity, ..row })
        };
        host.catalogue.call(remember).await?;
    }
    Ok(checked)
}
