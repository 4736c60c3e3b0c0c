//! What the daemon keeps of a session, so that a successor of its engine goes on with it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use snapshot_format::BuildId;
use tokio::sync::mpsc;
use uffd_engine::control::Request;
use uffd_engine::region::ClaimedRegion;
use uffd_engine::{PageStates, Tracking};

use super::SessionEvent;

/// What a successor needs to go on with a session.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) store: PathBuf,
    pub(super) build: BuildId,
    pub(super) states: Arc<PageStates>,
    pub(super) events: mpsc::Sender<SessionEvent>,
    pub(super) attached: Option<KeptVmm>,
    /// What its engine was told of tracking writes.
    pub(super) tracking: Tracking,
    /// What its engine does ahead of faults; of a recording that was begun nothing is left.
    pub(super) replays: bool,
    pub(super) load_bytes_per_second: Option<u64>,
}

impl Kept {
    /// What a successor is to be told of a session beside adopting it.
    pub(super) fn orders(&self, session: &str, number: impl Fn() -> u64) -> Vec<Request> {
        let mut orders = Vec::new();
        if self.replays {
            orders.push(Request::Replay {
                request: number(),
                session: session.to_owned(),
            });
        }
        if let Some(bytes_per_second) = self.load_bytes_per_second {
            orders.push(Request::Load {
                request: number(),
                session: session.to_owned(),
                bytes_per_second,
            });
        }
        orders
    }
}

/// The VMM's part of it.
#[derive(Debug)]
pub(super) struct KeptVmm {
    pub(super) memory: KeptMemory,
    pub(super) pidfd: OwnedFd,
    pub(super) regions: Vec<ClaimedRegion>,
}

/// Where its faults come from.
#[derive(Debug)]
pub(super) enum KeptMemory {
    /// It handed this over.
    Userfaultfd(OwnedFd),
    /// It asks for pages here, and finds them there.
    Requests {
        connection: OwnedFd,
        memory: OwnedFd,
        /// Its last engine did not die.
        surrendered: bool,
    },
}

impl Kept {
    /// Notes whether its last engine surrendered it, which is not so for long.
    pub(super) fn note_surrendered(&mut self, was: bool) {
        if let Some(KeptVmm {
            memory: KeptMemory::Requests { surrendered, .. },
            ..
        }) = &mut self.attached
        {
            *surrendered = was;
        }
    }

    /// What a successor is told to go on with a session, and the descriptors for it; `None` for
    /// one that has no memory yet.
    pub(super) fn adoption(
        &self,
        session: &str,
        request: u64,
    ) -> Option<(Request, Vec<BorrowedFd<'_>>)> {
        let vmm = self.attached.as_ref()?;
        let (session, store) = (session.to_owned(), self.store.clone());
        let (build, regions) = (self.build, vmm.regions.clone());
        let (pidfd, states) = (vmm.pidfd.as_fd(), self.states.as_fd());
        Some(match &vmm.memory {
            KeptMemory::Userfaultfd(uffd) => {
                let adopt = Request::Adopt {
                    request,
                    session,
                    store,
                    build,
                    regions,
                    tracking: self.tracking,
                };
                (adopt, vec![uffd.as_fd(), pidfd, states])
            }
            KeptMemory::Requests {
                connection,
                memory,
                surrendered,
            } => {
                let serve = Request::ServePages {
                    request,
                    session,
                    store,
                    build,
                    regions,
                    surrendered: *surrendered,
                };
                let fds = vec![connection.as_fd(), memory.as_fd(), pidfd, states];
                (serve, fds)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot_format::PageCount;

    #[test]
    fn a_successor_is_told_what_its_predecessor_did_ahead_of_faults() {
        let (events, _inbox) = mpsc::channel(1);
        let mut kept = Kept {
            store: "/builds".into(),
            build: BuildId::from_bytes([1; 16]),
            states: Arc::new(PageStates::create(PageCount::new(1)).unwrap()),
            events,
            attached: None,
            tracking: Tracking::Off,
            replays: false,
            load_bytes_per_second: None,
        };
        assert!(kept.orders("s", || 1).is_empty());
        (kept.replays, kept.load_bytes_per_second) = (true, Some(5));
        let orders = kept.orders("s", || 1);
        assert!(matches!(
            &orders[..],
            [
                Request::Replay { .. },
                Request::Load {
                    bytes_per_second: 5,
                    ..
                }
            ]
        ));
        assert!(orders.iter().all(|order| order.session() == Some("s")));
    }
}
