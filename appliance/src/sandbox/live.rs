//! What a sandbox has while it has a VMM, and giving all of it back.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use uffd_engine::{PageStates, Tracking};

use crate::catalogue::SandboxRow;
use crate::disks::Source;
use crate::engines::{Ahead, Attachment, SessionEvent};
use crate::host::{Host, remove_dir};
use crate::huge_pages::Promise;
use crate::network::Slot;
use crate::sys::readiness::Readable;
use crate::vmm::cgroup::Cgroup;
use crate::vmm::{Driver, Machine, Place, VmmError};

use super::OperationError;

/// How long what a VMM printed may take to arrive after its end.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// The part of a restored guest that its engine serves.
pub(super) struct Session {
    pub(super) attachment: Attachment,
    pub(super) ahead: Ahead,
    /// Who notices the guest's writes.
    pub(super) tracking: Tracking,
    pub(super) states: Arc<PageStates>,
    pub(super) events: mpsc::Receiver<SessionEvent>,
}

/// A sandbox with a VMM.
pub(super) struct Live {
    /// What its VMM is driven by.
    pub(super) driver: Arc<dyn Driver>,
    pub(super) machine: Box<dyn Machine>,
    /// `None` for a guest that was booted.
    pub(super) session: Option<Session>,
    /// What its memory needs of the host's huge pages; given back when all else is.
    pub(super) _huge_pages: Option<Promise>,
}

impl Live {
    /// The guest goes on after it was stopped, and so does what goes on behind its faults.
    ///
    /// # Errors
    /// It is stopped still.
    pub(super) async fn go_on(&mut self) -> Result<(), VmmError> {
        self.machine.go_on().await?;
        if let Some(session) = &self.session {
            session.attachment.load(&session.ahead).await;
        }
        Ok(())
    }

    /// Waits until the VMM ends or its engine gives up, and says which.
    pub(super) async fn end(&mut self) -> String {
        let exited = async {
            let pidfd = self.machine.pidfd().try_clone_to_owned();
            match pidfd.and_then(Readable::new) {
                Ok(pidfd) => {
                    let _ = pidfd.wait().await;
                }
                Err(_) => std::future::pending().await,
            }
        };
        let failed = async {
            match self.session.as_mut().map(|session| &mut session.events) {
                Some(events) => match events.recv().await {
                    Some(SessionEvent::Failed(reason)) => reason,
                    None => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            () = exited => None,
            reason = failed => Some(reason),
        };
        if ended.is_none() {
            self.machine.console().ended(LAST_WORDS).await;
        }
        ended.unwrap_or_else(|| {
            let how = match self.machine.exit() {
                Some(exit) => exit.to_string(),
                None => "no exit status".to_owned(),
            };
            let console = self.machine.console().tail();
            format!("Its VMM ended ({how}); its console ends with: {console}")
        })
    }
}

/// Sees to it that the host has the huge pages that the guest's memory is of, if it is.
pub(super) fn promise_memory(
    host: &Host,
    row: &SandboxRow,
) -> Result<Option<Promise>, OperationError> {
    let wanted = row.shape.huge_pages.then(|| row.shape.memory_bytes());
    let promised = wanted.map(|bytes| host.huge_pages.promise(bytes));
    Ok(promised.transpose()?)
}

/// What a VMM needs on the host: directories, a slot, a disk. Each part is made before it
/// is needed and given back by [`give_back`], whatever was reached.
pub(super) async fn make_place(
    host: &Arc<Host>,
    row: &SandboxRow,
    source: Source,
) -> Result<(Place, Slot), OperationError> {
    let (data, run) = (host.sandbox_data(&row.id), host.sandbox_run(&row.id));
    for dir in [&data, &run] {
        remove_dir(dir);
        std::fs::create_dir_all(dir).map_err(|source| OperationError::File {
            operation: format!("Making directory {}", dir.display()),
            source,
        })?;
    }
    let making = {
        let (disks, id) = (host.disks.clone(), row.id.clone());
        tokio::task::spawn_blocking(move || disks.make(id.as_str(), &source, &data))
    };
    let (slot, made) = tokio::join!(host.slots.take(row.slot, row.network.clone()), making);
    let disk = made.map_err(|_| OperationError::Worker)??;
    let slot = slot?;
    Ok((place_at(host, row, &slot, disk), slot))
}

/// Where a sandbox's VMM is, with a slot and a disk.
pub(super) fn place_at(host: &Host, row: &SandboxRow, slot: &Slot, disk: PathBuf) -> Place {
    Place {
        name: row.id.to_string(),
        template: row.template.to_string(),
        slot: row.slot.0,
        run_dir: host.sandbox_run(&row.id),
        namespace: slot.namespace.clone(),
        disk,
        disk_limits: host.disk_limits.with(row.disk_limits),
        cgroup: None,
    }
}

/// Gives a place its control group: that of the VMM which waited there, or a new one.
pub(super) fn confine(
    host: &Host,
    row: &SandboxRow,
    driver: &dyn Driver,
    waiting: Option<Cgroup>,
    place: &mut Place,
) -> Result<(), OperationError> {
    let (id, shape) = (row.id.as_str(), &row.shape);
    let confined = host.confinement.confine(id, waiting, shape, driver);
    place.cgroup = confined.map_err(|source| OperationError::File {
        operation: "Making a control group for the VMM".into(),
        source,
    })?;
    Ok(())
}

/// Ends the VMM if there is one and removes what [`make_place`] made.
pub(super) async fn give_back(host: &Arc<Host>, row: &SandboxRow, live: Option<Live>) {
    if let Some(mut live) = live {
        live.machine.kill().await;
        if let Some(session) = live.session {
            let name = session.attachment.session().to_owned();
            match session.attachment.detach().await {
                Ok(stats) => {
                    host.metrics.faults.end(&name, &stats);
                    tracing::info!(
                    sandbox_id = %row.id,
                    faults = stats.faults,
                    pages_installed = stats.pages_installed,
                    pages_copied = stats.pages_copied,
                    pages_read = stats.pages_read,
                    pages_zeroed = stats.pages_zeroed,
                    retries = stats.retries,
                    service_us_p50 = stats.service_us_p50,
                    service_us_p99 = stats.service_us_p99,
                    "Detached"
                    );
                }
                Err(error) => {
                    tracing::warn!(sandbox_id = %row.id, %error, "Its session is not detached");
                }
            }
        }
    }
    host.confinement.release(row.id.as_str());
    if let Err(error) = host.slots.give_back(row.slot).await {
        tracing::warn!(sandbox_id = %row.id, slot = row.slot.0, %error, "Its slot is left over");
    }
    let (disks, id) = (host.disks.clone(), row.id.clone());
    let removing = tokio::task::spawn_blocking(move || disks.remove(id.as_str()));
    if removing.await.is_err() {
        tracing::warn!(sandbox_id = %row.id, "Its disk is left over");
    }
    remove_dir(&host.sandbox_run(&row.id));
    remove_dir(&host.sandbox_data(&row.id));
}
