//! Guests that outlive their daemon, and the next daemon's taking them over.
//!
//! A VMM is nobody's child once its daemon has died, and its guest runs on: engines serve its memory,
//! the kernel its network and disk. What can't be found out from outside is written beside its
//! sockets when it begins to run, in memory that a reboot of the host clears as it ends the guests.
//!
//! Where engines have died with their daemon, a guest waits in the kernel for memory that isn't there
//! yet, until the next daemon's engine gets it from its VMM.

use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use snapshot_format::BuildStore;
use uffd_engine::sys::process::pidfd_signal;

use super::OperationError;
use super::live::{Live, Session, confine, give_back, place_at};
use crate::catalogue::SandboxRow;
use crate::engines::{Ahead, Engines, Inherited, Lost, Order, Orphan, Will, table_path};
use crate::host::Host;
use crate::vmm::cgroup::Cgroup;
use crate::vmm::process::{Survivor, ended};

/// The file in a sandbox's directory of sockets.
const FILE: &str = "running.json";

/// What a successor of this daemon needs to know of a guest that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its VMM's process.
    pub pid: i32,
    /// The kind of VMM, and which version.
    pub vmm: String,
    /// See there.
    pub version: String,
    /// Under which name an engine serves its memory, if one does.
    pub session: Option<String>,
    /// What another engine needs to know of it. Daemons before this one didn't say.
    #[serde(default)]
    pub will: Option<Will>,
}

impl Record {
    /// Of a guest that runs.
    pub(super) fn of(live: &Live) -> Self {
        let info = live.driver.info();
        let session = live.session.as_ref();
        Self {
            pid: live.machine.pid(),
            vmm: info.name.clone(),
            version: info.version.clone(),
            session: session.map(|session| session.attachment.session().to_owned()),
            will: session.and_then(|session| session.attachment.will(session.tracking)),
        }
    }

    /// Leaves it in a directory, whole or not at all.
    ///
    /// # Errors
    /// It can't be written.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        let (new, file) = (dir.join("running.json.new"), path(dir));
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, file)
    }

    /// What an earlier daemon has left in a directory.
    #[must_use]
    pub fn read(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path(dir)).ok()?).ok()
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// A guest that has outlived its daemon.
#[derive(Debug)]
pub struct Left {
    /// Its VMM.
    pub survivor: Survivor,
    /// What is known of it.
    pub record: Record,
    /// Its memory's session, if it had one.
    pub memory: Memory,
}

/// What has become of a guest's memory's session.
#[derive(Debug)]
pub enum Memory {
    /// It has none: all of its memory is its VMM's.
    Whole,
    /// An engine of this daemon has it. A start that fails leaves it to the next one.
    Served(ManuallyDrop<Inherited>),
    /// Nobody has it.
    Lost(Lost),
}

impl Left {
    /// Looks for its memory's session, which an engine has surrendered or its VMM has.
    pub fn look_for_memory(
        &mut self,
        engines: &Engines,
        store: &BuildStore,
        run_dir: &Path,
        deadline: Instant,
    ) {
        let Some(session) = &self.record.session else {
            return;
        };
        let orphan = Orphan {
            session,
            will: self.record.will.as_ref(),
            store: store.root(),
            states: &table_path(run_dir),
            vmm: &self.survivor,
        };
        let found = match engines.claim_inherited(session) {
            Some(inherited) => Ok(Some(inherited)),
            None => engines.take_in(&orphan, deadline),
        };
        self.memory = match found {
            Ok(Some(inherited)) => Memory::Served(ManuallyDrop::new(inherited)),
            Ok(None) => Memory::Whole,
            Err(lost) => Memory::Lost(lost),
        };
    }
}

/// Takes a guest over; it runs. On failure nothing of it is left.
pub(super) async fn adopt(
    host: &Arc<Host>,
    row: &SandboxRow,
    left: Left,
) -> Result<Live, OperationError> {
    let pidfd = left.survivor.pidfd.try_clone();
    let groups = host.confinement.groups();
    let group = groups.and_then(|groups| groups.of(left.survivor.pid));
    let adopted = try_adopt(host, row, left, group.clone()).await;
    if adopted.is_err() {
        if let Ok(pidfd) = pidfd {
            let _ = pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
            ended(pidfd.as_fd()).await;
        }
        if let Some(group) = group {
            group.remove();
        }
        give_back(host, row, None).await;
    }
    adopted
}

async fn try_adopt(
    host: &Arc<Host>,
    row: &SandboxRow,
    left: Left,
    group: Option<Cgroup>,
) -> Result<Live, OperationError> {
    let Left {
        survivor,
        record,
        memory,
    } = left;
    // From here on it ends with the guest.
    let inherited = match memory {
        Memory::Whole => None,
        Memory::Served(inherited) => Some(ManuallyDrop::into_inner(inherited)),
        Memory::Lost(lost) => return Err(lost.into()),
    };
    let huge_pages = row.shape.huge_pages;
    let huge_pages = huge_pages.then(|| host.huge_pages.promised_before(row.shape.memory_bytes()));
    let driver = host.drivers.named_like(&record.vmm, &record.version);
    let driver = driver.ok_or_else(|| OperationError::Adoption {
        problem: format!(
            "its VMM is {} {}, and this host has {}",
            record.vmm,
            record.version,
            host.drivers.named()
        ),
    })?;
    let slot = host.slots.adopt(row.slot);
    host.slots.enforce(row.slot, row.network.clone()).await?;
    let disk = {
        let (disks, id) = (host.disks.clone(), row.id.clone());
        let dir = host.sandbox_data(&row.id);
        let adopting = tokio::task::spawn_blocking(move || disks.adopt(id.as_str(), &dir));
        adopting.await.map_err(|_| OperationError::Worker)??
    };
    let mut place = place_at(host, row, &slot, disk);
    if group.is_some() {
        // With today's limits.
        confine(host, row, driver.as_ref(), group, &mut place)?;
    }
    let session = inherited.map(|inherited| Session {
        attachment: inherited.attachment,
        ahead: Ahead::new(&host.engine, driver.tracking(), Order::Neither),
        tracking: inherited.tracking,
        states: inherited.states,
        events: inherited.events,
    });
    let machine = driver.adopt(&row.shape, &place, survivor).await?;
    Ok(Live {
        driver: driver.clone(),
        machine,
        session,
        _huge_pages: huge_pages,
    })
}

#[cfg(test)]
mod tests {
    use snapshot_format::BuildId;
    use uffd_engine::Tracking;
    use uffd_engine::region::ClaimedRegion;

    use super::*;

    #[test]
    fn a_record_of_a_daemon_before_wills_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let old = r#"{"pid":7,"vmm":"qemu","version":"7.2","session":"one-1"}"#;
        fs::write(path(dir.path()), old).unwrap();
        let record = Record::read(dir.path()).unwrap();
        assert_eq!((record.pid, record.will), (7, None));
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_half_a_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(dir.path()), None);
        let record = Record {
            pid: 7,
            vmm: "qemu".into(),
            version: "7.2".into(),
            session: Some("one-1".into()),
            will: Some(Will {
                build: BuildId::from_bytes([3; 16]),
                regions: vec![ClaimedRegion {
                    base: 1 << 40,
                    size: 8192,
                    offset: 0,
                    page_size: 4096,
                }],
                asks: false,
                tracking: Tracking::Events,
                replays: true,
                load_bytes_per_second: Some(9),
            }),
        };
        record.write(dir.path()).unwrap();
        assert_eq!(Record::read(dir.path()), Some(record));
        fs::write(path(dir.path()), b"{\"pid\": 7").unwrap();
        assert_eq!(Record::read(dir.path()), None);
    }
}
