//! A sandbox from a build: check it, give the VMM its device state and an engine that
//! serves its memory, let it go on.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use snapshot_format::{BuildId, PageIndex};
use tokio::sync::oneshot;

use super::OperationError;
use super::boot::introduce;
use super::live::{Live, Session, confine, give_back, make_place, promise_memory};
use super::snapshot::{LABEL_PURPOSE, Purpose, had_disk_limits};
use crate::catalogue::{BuildRow, SandboxRow, builds};
use crate::disks::Source;
use crate::engines::{Ahead, Order, Wanted};
use crate::guest::Guest;
use crate::host::Host;
use crate::integrity::{self, Checked};
use crate::metrics::Milestone;
use crate::vmm::{Driver, Machine, Paging, Restore};

#[derive(Default)]
struct Parts {
    machine: Option<(Arc<dyn Driver>, Box<dyn Machine>)>,
    session: Option<Session>,
}

/// Restores a guest; on failure nothing of it is left, and the build is untouched.
pub(super) async fn restore(
    host: &Arc<Host>,
    row: &SandboxRow,
    build: BuildId,
) -> Result<Live, OperationError> {
    let huge_pages = promise_memory(host, row)?;
    let mut parts = Parts::default();
    let result = try_restore(host, row, build, &mut parts).await;
    let Parts { machine, session } = parts;
    let live = machine.map(|(driver, machine)| Live {
        driver,
        machine,
        session,
        _huge_pages: huge_pages,
    });
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
    // What is wrong with a build is found while its place is made, which is given back then.
    let disk = Source::Build(host.store.path(&build));
    let checking = async {
        let checked = check(host, build).await;
        (checked, started.elapsed())
    };
    let ((checked, checked_at), made) = tokio::join!(checking, make_place(host, row, disk));
    let (checked, working_set) = checked?;
    let driver = host.drivers.for_build(&checked.build.manifest().vmm)?;
    let (mut place, slot) = made?;
    let waiting = host.ready.claim(&slot, driver, &place.run_dir);
    let was_waiting = waiting.is_some();
    let (waiting, cgroup) = waiting.map(|it| (it.prepared, it.cgroup)).unzip();
    confine(host, row, driver.as_ref(), cgroup.flatten(), &mut place)?;
    let placed_at = started.elapsed();

    let pages = checked.build.map().memory_pages();
    let states = host.tables.make(&place.run_dir, pages);
    let states = Arc::new(states.map_err(|source| OperationError::File {
        operation: "Making the page-state table".into(),
        source,
    })?);
    let handoff = driver.handoff(&place);
    let handoff = handoff.map_err(|source| OperationError::File {
        operation: "Making a directory for the VMM".into(),
        source,
    })?;
    let session = format!("{}-{build}", row.id);
    let wanted = Wanted {
        session: &session,
        store: host.store.root(),
        build,
        states: states.clone(),
        socket: &handoff,
        deadline: host.boot_timeout,
    };
    let (asks, asked) = oneshot::channel();
    let expected = match driver.paging() {
        Paging::HandedOver => Some(host.engines.expect(wanted)?),
        Paging::Requested => Some(host.engines.expect_requests(wanted, asked)?),
        Paging::Own => {
            write_memory(host, build, &handoff).await?;
            None
        }
    };
    // The VMM hands its memory over while it starts: both go on together, and the failure
    // of either calls the other off.
    let pins = host.engine.pin_vcpus && row.shape.vcpus == 1;
    let restored = async {
        let restore = Restore {
            state: checked.vmstate,
            handoff: &handoff,
            had_disk_limits: had_disk_limits(checked.build.manifest()),
            run: !pins,
            asks: Some(asks),
        };
        let restored = match waiting {
            Some(vmm) => vmm.restore(&row.shape, &place, restore),
            None => driver.restore(&row.shape, &place, restore),
        };
        restored.await.map_err(OperationError::from)
    };
    // A VMM that asks for all pages has no working set.
    let working_set = match driver.paging() {
        Paging::HandedOver => working_set,
        Paging::Requested | Paging::Own => Order::Neither,
    };
    let ahead = Ahead::new(&host.engine, driver.tracking(), working_set);
    let attached = async {
        let Some((expected, events)) = expected else {
            return Ok(None);
        };
        let attachment = expected.attached().await?;
        let tracking = attachment.begin(&ahead).await;
        Ok(Some((attachment, tracking, events)))
    };
    let (machine, attached) = tokio::try_join!(restored, attached)?;
    let mut worker_cpu = None;
    if let Some((attachment, tracking, events)) = attached {
        worker_cpu = attachment.worker_cpu();
        parts.session = Some(Session {
            attachment,
            ahead,
            tracking,
            states,
            events,
        });
    }
    let (_, machine) = parts.machine.insert((driver.clone(), machine));
    if pins {
        pin(machine.as_mut(), worker_cpu).await;
        machine.go_on().await?;
    }
    let running_at = started.elapsed();
    introduce(host, row, &Guest::at(slot.address), machine.as_ref()).await?;
    let answered_at = started.elapsed();
    host.metrics.restored(
        was_waiting,
        [
            (Milestone::Checked, checked_at),
            (Milestone::Claimed, placed_at),
            (Milestone::Running, running_at),
            (Milestone::Answered, answered_at),
        ],
    );
    tracing::info!(
        sandbox_id = %row.id,
        build_id = %build,
        slot = row.slot.0,
        pid = machine.pid(),
        was_waiting,
        checked_us = checked_at.as_micros() as u64,
        placed_us = placed_at.as_micros() as u64,
        running_us = running_at.as_micros() as u64,
        vmm_us = machine.vmm_time().as_micros() as u64,
        answered_us = answered_at.as_micros() as u64,
        "Restored"
    );
    Ok(())
}

/// Writes all of a build's memory to a plain file, for a VMM that pages by itself.
async fn write_memory(host: &Arc<Host>, build: BuildId, path: &Path) -> Result<(), OperationError> {
    let (store, path) = (host.store.clone(), path.to_owned());
    let writing = tokio::task::spawn_blocking(move || {
        let build = store.open(&build)?;
        let failed = |source| OperationError::File {
            operation: format!("Writing {}", path.display()),
            source,
        };
        let page_bytes = build.map().page_size().bytes();
        let pages = build.map().memory_pages().get();
        let file = File::create(&path).map_err(failed)?;
        file.set_len(pages * page_bytes).map_err(failed)?;
        let mut bytes = vec![0; page_bytes as usize];
        for page in 0..pages {
            build.read_page(PageIndex::new(page), &mut bytes)?;
            // What is zero stays a hole.
            if bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(&bytes, page * page_bytes)
                    .map_err(failed)?;
            }
        }
        Ok(())
    });
    writing.await.map_err(|_| OperationError::Worker)?
}

/// Puts a guest's vCPU beside the worker that answers its faults. It is faster there, and as right
/// anywhere.
async fn pin(machine: &mut dyn Machine, cpu: Option<usize>) {
    let Some(cpu) = cpu else { return };
    let threads = machine.vcpu_threads().await.unwrap_or_else(|error| {
        tracing::warn!(%error, "Which vCPU to pin?");
        Vec::new()
    });
    let mut set = CpuSet::new();
    for thread in threads {
        let pinned = set
            .set(cpu)
            .and_then(|()| sched_setaffinity(Pid::from_raw(thread), &set));
        if let Err(error) = pinned {
            tracing::warn!(thread, cpu, %error, "A vCPU is not pinned");
        }
    }
}

/// Checks a build off the shard's thread, and remembers what was found right. With it comes what
/// to do about its working set.
async fn check(host: &Arc<Host>, build: BuildId) -> Result<(Checked, Order), OperationError> {
    let known = host.identities(build).await?;
    let store = host.store.clone();
    let sets = host
        .engine
        .working_sets
        .then(|| host.engines.working_sets().clone());
    let checking = tokio::task::spawn_blocking(move || {
        let checked = integrity::check(&store, build, |id| known.get(&id).cloned())?;
        let order = sets.map_or(Order::Neither, |sets| {
            let purpose = checked.build.manifest().labels.get(LABEL_PURPOSE);
            let is_template = purpose.is_some_and(|purpose| purpose == Purpose::Template.name());
            sets.order(&checked.build, is_template)
        });
        Ok::<_, OperationError>((checked, order))
    });
    let (checked, order) = checking.await.map_err(|_| OperationError::Worker)??;
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
    Ok((checked, order))
}
