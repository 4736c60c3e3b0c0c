//! What a daemon leaves in writing of a session, and how the next one goes on with it when the
//! session's engine has died, too.
//!
//! ```text
//!   the will (running.json): build, regions ─┐
//!   a file in memory: page states ───────────┼─▶ Kept ──Adopt──▶ this daemon's engine
//!   the VMM's own descriptors: userfaultfd ──┘
//! ```
//!
//! Nobody reads events meanwhile: vCPUs that fault wait in the kernel, and so does a VMM that gives
//! memory back. The page states are locked by whoever has them, so that no memory is served twice.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use snapshot_format::BuildId;
use thiserror::Error;
use tokio::sync::mpsc;
use uffd_engine::region::ClaimedRegion;
use uffd_engine::{PageState, PageStates, Tracking};

use super::inheritance::{Heirloom, Inherited, MAX_EVENTS, pages_of};
use super::kept::{Kept, KeptMemory, KeptVmm};
use super::userfaultfd::{self, UserfaultfdError};
use super::{Attachment, Engines};
use crate::vmm::process::Survivor;

/// How often a table that is held is tried again.
const PAUSE: Duration = Duration::from_millis(5);

/// What is said of a session while its guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Will {
    /// The build whose memory is served.
    pub build: BuildId,
    /// The guest's memory as its VMM mapped it.
    pub regions: Vec<ClaimedRegion>,
    /// Its VMM asks for pages, on a connection that ends with its engine.
    pub asks: bool,
    /// Who notices the guest's writes.
    pub tracking: Tracking,
    /// Whether a working set is replayed.
    pub replays: bool,
    /// How fast all memory is loaded, if it is.
    pub load_bytes_per_second: Option<u64>,
}

/// Why nobody can go on with a session.
#[derive(Debug, Error)]
pub enum Lost {
    /// There is no will.
    #[error("no engine has its memory, and its daemon did not write down where that is")]
    NoWill,
    /// Its page states were in no file.
    #[error(
        "no engine has its memory, and its page states are not at {path}: they outlive daemon and \
         engine where run_dir is on a tmpfs with room for them"
    )]
    NoStates {
        /// Where they would be.
        path: PathBuf,
    },
    /// They can't be had.
    #[error("no engine has its memory, and its page states at {path} can't be used")]
    States {
        /// Where they are.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Somebody has them who did not surrender.
    #[error("an engine that did not surrender it has its page states at {path} still")]
    Held {
        /// Where they are.
        path: PathBuf,
    },
    /// Its regions can't be any memory.
    #[error("no engine has its memory, and the regions that its daemon wrote down are none")]
    NoRegions,
    /// Its VMM's descriptor.
    #[error("no engine has its memory, and its VMM's can't be taken over")]
    Userfaultfd(#[from] UserfaultfdError),
    /// Its VMM asks for pages, and not all were there.
    #[error(
        "no engine has its memory, and its VMM asked for pages on a connection that ended with its engine"
    )]
    Asked,
}

/// A session whose daemon and engine have died, and what is left of it.
#[derive(Debug)]
pub struct Orphan<'a> {
    /// Its name.
    pub session: &'a str,
    /// What its daemon wrote down.
    pub will: Option<&'a Will>,
    /// The directory of builds.
    pub store: &'a Path,
    /// The file of its page states.
    pub states: &'a Path,
    /// Its VMM.
    pub vmm: &'a Survivor,
}

impl Engines {
    /// Has the least busy engine go on with a session that nobody surrendered; `None` for one that needs
    /// no engine any more. Its engine may have until the deadline to be gone.
    ///
    /// # Errors
    /// What of it is lost.
    pub fn take_in(
        &self,
        orphan: &Orphan<'_>,
        deadline: Instant,
    ) -> Result<Option<Inherited>, Lost> {
        let will = orphan.will.ok_or(Lost::NoWill)?;
        let states = Arc::new(page_states(will, orphan.states, deadline)?);
        let (pid, pidfd) = (orphan.vmm.pid, &orphan.vmm.pidfd);
        if will.asks {
            // Its answers are in its memory, if all are there, whatever it has seen of them. As long as it
            // waits for one it has a userfaultfd, and without one it finds its memory as it is.
            let finished = userfaultfd::count(pid, pidfd)? == 0;
            return if finished && is_complete(&states) {
                Ok(None)
            } else {
                Err(Lost::Asked)
            };
        }
        let uffd = userfaultfd::of(pid, pidfd)?;
        let pidfd = pidfd.try_clone().map_err(UserfaultfdError::from)?;
        let session = orphan.session;
        let heirloom = will.carried_out(orphan, states.clone(), uffd, pidfd);
        let idlest = self.links.iter().min_by_key(|link| link.sessions());
        let link = idlest.expect("a host has a node");
        let events = link.take_in(heirloom);
        tracing::warn!(session, "Took a session over from its VMM");
        Ok(Some(Inherited {
            attachment: Attachment::new(link.clone(), session),
            events,
            states,
            build: will.build,
            tracking: will.tracking,
        }))
    }
}

impl Will {
    fn carried_out(
        &self,
        orphan: &Orphan<'_>,
        states: Arc<PageStates>,
        uffd: OwnedFd,
        pidfd: OwnedFd,
    ) -> Heirloom {
        let (sender, events) = mpsc::channel(MAX_EVENTS);
        let kept = Kept {
            store: orphan.store.to_owned(),
            build: self.build,
            states,
            events: sender,
            attached: Some(KeptVmm {
                memory: KeptMemory::Userfaultfd(uffd),
                pidfd,
                regions: self.regions.clone(),
            }),
            tracking: self.tracking,
            replays: self.replays,
            load_bytes_per_second: self.load_bytes_per_second,
        };
        Heirloom {
            session: orphan.session.to_owned(),
            kept,
            events,
        }
    }
}

/// Opens the page states, as soon as those who had them are gone.
fn page_states(will: &Will, path: &Path, deadline: Instant) -> Result<PageStates, Lost> {
    let pages = pages_of(&will.regions).ok_or(Lost::NoRegions)?;
    let at = || path.to_owned();
    loop {
        let source = match PageStates::open_file(path, pages) {
            Ok(states) => return Ok(states),
            Err(source) => source,
        };
        match source.kind() {
            // A process that was killed may take a moment to end.
            io::ErrorKind::WouldBlock if Instant::now() < deadline => std::thread::sleep(PAUSE),
            io::ErrorKind::WouldBlock => return Err(Lost::Held { path: at() }),
            io::ErrorKind::NotFound => return Err(Lost::NoStates { path: at() }),
            _ => return Err(Lost::States { path: at(), source }),
        }
    }
}

/// Whether every page was put into the memory, or taken from there again.
fn is_complete(states: &PageStates) -> bool {
    let is_there = |state| !matches!(state, PageState::Missing | PageState::Reading);
    states.to_vec().into_iter().all(is_there)
}
