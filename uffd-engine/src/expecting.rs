//! A session before its VMM has connected: a listening socket, a deadline, and the
//! bytes of a hand-off as they come in.
//!
//! Invariant: whatever goes wrong, every descriptor received so far is closed with
//! this value, and the VMM that waits for an answer sees its connection closed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::fault_source::Guest;
use crate::handoff::{self, HandoffError, Progress};
use crate::page_state::PageStates;
use crate::region::{ClaimedRegion, Region, RegionTable};
use crate::session::SessionParts;
use crate::source::PageSource;
use crate::sys::fdpass;
use crate::sys::process::pidfd_open;
use crate::sys::uffd::Uffd;
use crate::tracking::Tracking;

/// How long a peer that has connected may take to send its message: VMMs send it at once.
const PATIENCE_ONCE_CONNECTED: Duration = Duration::from_secs(5);

/// Why a session never came to be.
#[derive(Debug, Error)]
pub(crate) enum ExpectError {
    /// Nobody connected, or a peer connected and then sent too little, until the deadline.
    #[error("No VMM handed its memory over before the deadline")]
    Deadline,
    /// The message is unusable.
    #[error("Refusing a hand-off")]
    Handoff(#[from] HandoffError),
    /// A system call failed.
    #[error("{operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// A session that waits for its VMM.
pub(crate) struct Expecting {
    pub(crate) listener: OwnedFd,
    pub(crate) connection: Option<OwnedFd>,
    pub(crate) deadline: Instant,
    states: PageStates,
    source: Arc<PageSource>,
    message: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// What one readable descriptor brought.
pub(crate) enum Step {
    /// Nothing complete yet.
    Wait,
    /// The VMM has connected; watch this connection.
    Connected,
    /// The whole message is here and its regions fit the build.
    Complete(RegionTable),
}

impl Expecting {
    pub(crate) fn new(
        listener: OwnedFd,
        states: PageStates,
        source: Arc<PageSource>,
        deadline: Instant,
    ) -> Self {
        Self {
            listener,
            connection: None,
            deadline,
            states,
            source,
            message: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// The listener is readable.
    pub(crate) fn accept(&mut self) -> Result<Step, ExpectError> {
        if self.connection.is_some() {
            return Ok(Step::Wait);
        }
        match fdpass::accept(self.listener.as_fd()) {
            Ok(connection) => {
                self.connection = Some(connection);
                self.deadline = self.deadline.min(Instant::now() + PATIENCE_ONCE_CONNECTED);
                Ok(Step::Connected)
            }
            Err(error) if is_transient(&error) => Ok(Step::Wait),
            Err(source) => Err(ExpectError::Io {
                operation: "Accepting a hand-off",
                source,
            }),
        }
    }

    /// The connection is readable: reads all that is there, because a poll reports what
    /// arrives and not what was left. Bounded by the longest message.
    pub(crate) fn receive(&mut self) -> Result<Step, ExpectError> {
        loop {
            if let Some(step) = self.receive_some()? {
                return Ok(step);
            }
        }
    }

    /// `None` when there may be more to read.
    fn receive_some(&mut self) -> Result<Option<Step>, ExpectError> {
        let Some(connection) = &self.connection else {
            return Ok(Some(Step::Wait));
        };
        let mut buffer = [0u8; 16 << 10];
        let received = match fdpass::receive(connection.as_fd(), &mut buffer) {
            Ok(received) => received,
            Err(error) if is_transient(&error) => return Ok(Some(Step::Wait)),
            Err(source) => {
                return Err(ExpectError::Io {
                    operation: "Receiving a hand-off",
                    source,
                });
            }
        };
        self.fds.extend(received.fds);
        if self.fds.len() > 1 || received.truncated {
            return Err(HandoffError::Descriptors {
                count: self.fds.len(),
            }
            .into());
        }
        if received.len == 0 {
            return Err(HandoffError::Incomplete {
                bytes: self.message.len(),
            }
            .into());
        }
        self.message.extend_from_slice(&buffer[..received.len]);
        match handoff::parse(&self.message)? {
            Progress::NeedMore => Ok(None),
            Progress::Complete(claims) => {
                let page_bytes = self.source.page_size().bytes();
                let regions = RegionTable::new(&claims, page_bytes, self.source.memory_pages())
                    .map_err(HandoffError::from)?;
                Ok(Some(Step::Complete(regions)))
            }
        }
    }

    /// Turns a complete hand-off into the parts of a session, and names the VMM's process.
    pub(crate) fn into_parts(
        self,
        regions: RegionTable,
    ) -> Result<(SessionParts, i32), ExpectError> {
        let failed = |operation| move |source| ExpectError::Io { operation, source };
        let fd = self
            .fds
            .into_iter()
            .next()
            .ok_or(HandoffError::Descriptors { count: 0 })?;
        let uffd = Uffd::from_handed_over(fd).map_err(HandoffError::NotUffd)?;
        let connection = self.connection.expect("a message came over a connection");
        let peer =
            fdpass::peer_pid(connection.as_fd()).map_err(failed("Asking who handed over"))?;
        let pidfd = pidfd_open(peer).map_err(failed("Watching the VMM's process"))?;
        let parts = SessionParts {
            guest: Guest::Userfaultfd(uffd),
            pidfd,
            handoff: Some(connection),
            regions,
            states: self.states,
            source: self.source,
            tracking: Tracking::Off,
        };
        Ok((parts, peer))
    }

    pub(crate) fn connection(&self) -> Option<BorrowedFd<'_>> {
        self.connection.as_ref().map(AsFd::as_fd)
    }
}

/// Nothing to read yet, or a peer that left before it was accepted.
fn is_transient(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, WouldBlock};
    matches!(error.kind(), WouldBlock | ConnectionAborted)
}

/// The regions of a session as its daemon keeps them, to hand them to a successor.
pub(crate) fn claims_of(regions: &RegionTable) -> Vec<ClaimedRegion> {
    let page_bytes = regions.page_bytes();
    let claim = |region: &Region| ClaimedRegion {
        base: region.base.get(),
        size: region.pages.get() * page_bytes,
        offset: region.first_page.get() * page_bytes,
        page_size: page_bytes,
    };
    regions.regions().iter().map(claim).collect()
}
