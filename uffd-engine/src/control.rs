//! The protocol between the daemon and an engine: one JSON message per packet of a
//! `SOCK_SEQPACKET` socket, descriptors attached.
//!
//! ```text
//!   daemon                                   engine
//!     │ Expect {listener, page states} ─────▶  │   waits for the VMM's hand-off
//!     │ ◀─────── Attached {regions} + uffd     │   serving; the daemon keeps the fd
//!     │ ◀─────── Failed | Ended                │   at any time after
//!     │ Stats ──▶  ◀── Stats                   │
//!     │ Detach ──▶ ◀── Detached {stats}        │   after the VMM's end
//!
//!   the next daemon                          the same engine, whose daemon has died
//!     │ Surrender ──────────────────────────▶  │   serves nobody any more
//!     │ ◀── Surrendered + its descriptors      │   one for each session that has memory
//!     │ ◀── SurrenderedAll                     │   ends; if that can't be sent, serves on
//! ```
//!
//! A successor engine gets `Adopt` (or `ServePages`) with what the daemon kept, or with what was
//! surrendered. Every request has a number; exactly one reply carries it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use snapshot_format::BuildId;

use crate::counters::SessionStats;
use crate::region::ClaimedRegion;
use crate::sys::fdpass;
use crate::tracking::Tracking;

/// The longest message; `Attached` with every region fits four times.
const MAX_MESSAGE_BYTES: usize = 512 << 10;

/// What a daemon asks of an engine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Serve the memory that a VMM will hand over. Descriptors: a listening Unix
    /// stream socket, the page-state table.
    Expect {
        /// Number of this request.
        request: u64,
        /// The sandbox it is for; unique among sessions.
        session: String,
        /// The directory of builds.
        store: PathBuf,
        /// The build whose memory is restored.
        build: BuildId,
        /// How long the VMM may take.
        deadline_ms: u64,
    },
    /// As `Expect`, for a plain memory file instead of a build.
    ExpectFile {
        /// Number of this request.
        request: u64,
        /// The sandbox it is for; unique among sessions.
        session: String,
        /// The memory, byte for byte.
        file: PathBuf,
        /// The size of the guest's pages, in bytes.
        page_bytes: u64,
        /// How long the VMM may take.
        deadline_ms: u64,
    },
    /// Go on with a session whose engine died. Descriptors: its userfaultfd, its VMM's
    /// pidfd, its page-state table.
    Adopt {
        /// Number of this request.
        request: u64,
        /// The sandbox it is for.
        session: String,
        /// The directory of builds.
        store: PathBuf,
        /// The build whose memory is restored.
        build: BuildId,
        /// As reported when it was attached.
        regions: Vec<ClaimedRegion>,
        /// As it was asked for of the dead engine.
        tracking: Tracking,
    },
    /// Serve a VMM that asks for pages: a Cloud Hypervisor that is being sent everything but its
    /// memory (`memory_mode=postcopy`). Descriptors: its connection for page requests, its
    /// memory's one memfd, its pidfd, the page-state table. Answered with `Attached`; `Ended` comes when it closes the
    /// socket.
    ServePages {
        /// Number of this request.
        request: u64,
        /// The sandbox it is for; unique among sessions.
        session: String,
        /// The directory of builds.
        store: PathBuf,
        /// The build whose memory is restored.
        build: BuildId,
        /// The guest's memory, with guest addresses for host addresses; in the memfd as in the
        /// snapshot.
        regions: Vec<ClaimedRegion>,
        /// An engine served it before and surrendered it, which it does with no answer half sent.
        #[serde(default)]
        surrendered: bool,
    },
    /// Stop serving and close everything of a session.
    Detach {
        /// Number of this request.
        request: u64,
        /// Which session.
        session: String,
    },
    /// Report a session's counters.
    Stats {
        /// Number of this request.
        request: u64,
        /// Which session.
        session: String,
    },
    /// Track which pages the guest writes from now on, exactly; what is installed already
    /// counts as written. Answered with `Stats`, or `Refused` where the memory doesn't allow it.
    Track {
        /// Number of this request.
        request: u64,
        /// Which session.
        session: String,
        /// Who notices a write.
        tracking: Tracking,
    },
    /// Record the pages of demand faults, for a bounded time after the first. Answered with
    /// `Stats`; when the time is over, or the session detached, `Recorded` comes by itself.
    /// Not together with a replay, whose pages don't fault.
    Record {
        /// Number of this request.
        request: u64,
        /// Which session.
        session: String,
        /// How long after the first fault.
        window_ms: u64,
        /// Pages that are kept at most.
        max_pages: usize,
    },
    /// End a recording now. Answered with `Stats`, after `Recorded`.
    EndRecording {
        /// Number of this request.
        request: u64,
        /// Which session.
        session: String,
    },
    /// Replay the working set that lies beside the session's build. Answered with `Stats`,
    /// also when there is none to replay.
    Replay {
        /// Number of this request.
        request: u64,
        /// Which session.
        session: String,
    },
    /// Load all memory that the build stores, in the background. Answered with `Stats`; when
    /// all of it is there, `Loaded` comes by itself.
    Load {
        /// Number of this request.
        request: u64,
        /// Which session.
        session: String,
        /// At most this fast.
        bytes_per_second: u64,
    },
    /// End replay and load; what was installed stays. Answered with `Stats`.
    Halt {
        /// Number of this request.
        request: u64,
        /// Which session.
        session: String,
    },
    /// Stop serving, hand everything of all sessions that have memory over for a successor, and end the
    /// process. Answered with `SurrenderedAll`, behind one `Surrendered` for each. Sessions whose
    /// VMM has not come, and those of plain files, are given up. Of a recording nothing is left.
    Surrender {
        /// Number of this request.
        request: u64,
    },
    /// End the process.
    Shutdown,
}

impl Request {
    /// The session that it is about.
    #[must_use]
    pub fn session(&self) -> Option<&str> {
        match self {
            Self::Expect { session, .. }
            | Self::ExpectFile { session, .. }
            | Self::Adopt { session, .. }
            | Self::ServePages { session, .. }
            | Self::Detach { session, .. }
            | Self::Stats { session, .. }
            | Self::Track { session, .. }
            | Self::Record { session, .. }
            | Self::EndRecording { session, .. }
            | Self::Replay { session, .. }
            | Self::Load { session, .. }
            | Self::Halt { session, .. } => Some(session),
            Self::Surrender { .. } | Self::Shutdown => None,
        }
    }
}

/// Which request goes on with a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Succession {
    /// [`Request::Adopt`]
    Adopt,
    /// [`Request::ServePages`]
    ServePages,
}

/// What an engine tells its daemon.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Report {
    /// A hand-off arrived (descriptor: the userfaultfd), or a session was adopted or is asked for
    /// pages (none).
    Attached {
        /// The request this answers.
        request: u64,
        /// Which session.
        session: String,
        /// The VMM's process.
        peer_pid: i32,
        /// The guest's memory as the VMM mapped it.
        regions: Vec<ClaimedRegion>,
        /// The CPU that its worker is pinned to, if it is.
        worker_cpu: Option<usize>,
    },
    /// A request can't be met.
    Refused {
        /// The request this answers.
        request: u64,
        /// Why, with all causes.
        reason: String,
    },
    /// A session's counters now.
    Stats {
        /// The request this answers.
        request: u64,
        /// The counters.
        stats: SessionStats,
    },
    /// What was recorded of a session. Descriptor: the pages in first-touch order, for
    /// [`recording::from_memfd`](crate::recording::from_memfd).
    Recorded {
        /// Which session.
        session: String,
        /// How many pages.
        pages: u64,
    },
    /// All that the build stores of a session's memory is there.
    Loaded {
        /// Which session.
        session: String,
        /// How many pages that took.
        pages: u64,
    },
    /// A session was detached.
    Detached {
        /// The request this answers.
        request: u64,
        /// Its last counters.
        stats: SessionStats,
    },
    /// A session that this engine serves no more. Descriptors: those of the request that goes on
    /// with it, in that request's order.
    Surrendered {
        /// Which session.
        session: String,
        /// The directory of builds.
        store: PathBuf,
        /// The build whose memory is restored.
        build: BuildId,
        /// Which request goes on with it.
        succession: Succession,
        /// The guest's memory, as that request names it.
        regions: Vec<ClaimedRegion>,
        /// Who notices the guest's writes.
        tracking: Tracking,
        /// Whether a working set is being replayed.
        replays: bool,
        /// How fast all memory is being loaded, if it is.
        load_bytes_per_second: Option<u64>,
    },
    /// All sessions were surrendered; the process ends.
    SurrenderedAll {
        /// The request this answers.
        request: u64,
        /// How many there were.
        sessions: u64,
    },
    /// Some of the guest's memory can't be served any more.
    Failed {
        /// Which session.
        session: String,
        /// Why.
        reason: String,
    },
    /// The VMM's process has ended, or it asks for no pages any more.
    Ended {
        /// Which session.
        session: String,
    },
}

/// Sends one message.
///
/// # Errors
/// As `sendmsg(2)`.
///
/// # Panics
/// Never: the messages always serialise.
pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message).expect("control messages serialise");
    fdpass::send(socket, &bytes, fds)
}

/// Receives one message; `None` when the peer has closed.
///
/// # Errors
/// As `recvmsg(2)`; `InvalidData` for what is no message.
pub fn receive<T: for<'de> Deserialize<'de>>(
    socket: BorrowedFd<'_>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buffer = vec![0u8; MAX_MESSAGE_BYTES];
    let received = fdpass::receive(socket.as_fd(), &mut buffer)?;
    if received.len == 0 {
        return Ok(None);
    }
    if received.truncated {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a control message was cut",
        ));
    }
    let message = serde_json::from_slice(&buffer[..received.len])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((message, received.fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::MAX_REGIONS;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    #[test]
    fn the_largest_session_fits_one_packet() {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let region = ClaimedRegion {
            base: u64::MAX,
            size: u64::MAX,
            offset: u64::MAX,
            page_size: u64::MAX,
        };
        let report = Report::Surrendered {
            session: "s".repeat(255),
            store: "/long".repeat(800).into(),
            build: BuildId::from_bytes([9; 16]),
            succession: Succession::ServePages,
            regions: vec![region; MAX_REGIONS],
            tracking: Tracking::Kernel,
            replays: true,
            load_bytes_per_second: Some(u64::MAX),
        };
        let fds = [ours.as_fd(); 4];
        send(ours.as_fd(), &report, &fds).unwrap();
        let (received, fds) = receive::<Report>(theirs.as_fd()).unwrap().unwrap();
        let Report::Surrendered { regions, .. } = received else {
            panic!("{received:?}")
        };
        assert_eq!((regions.len(), fds.len()), (MAX_REGIONS, 4));
    }
}
