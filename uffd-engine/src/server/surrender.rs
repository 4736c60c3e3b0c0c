//! Handing all sessions over to the next daemon, which has an engine of its own go on with them.
//!
//! ```text
//!   worker ── between two turns ──▶ its sessions ──▶ control thread ──▶ daemon
//!     ▲                                                   │
//!     └──────────── all, if the daemon is gone ───────────┘
//! ```
//!
//! A guest that waits for a page waits a little longer: whoever goes on wakes all of its memory,
//! and its faults are reported again. Invariant: every session is with one side only. The daemon
//! has them once everything is sent, and an engine that could not send all of it keeps all.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::beginning::{Begin, Opening};
use super::{Engine, OfBuild, Then};
use crate::control::{self, Report, Request, Succession};
use crate::expecting::claims_of;
use crate::fault_source::Guest;
use crate::tracking::Tracking;
use crate::worker::{Command, Moving};

/// How long workers may take to come to the end of their turns.
const WORKERS_PATIENCE: Duration = Duration::from_secs(2);
/// How long a daemon may take to receive one more report.
const DAEMON_PATIENCE: Duration = Duration::from_secs(5);

/// One report and what goes with it.
type Surrendered<'a> = (Report, Vec<BorrowedFd<'a>>);

impl Engine {
    /// Gives every session to the daemon; keeps all when it doesn't take them.
    pub(super) fn surrender(&mut self, request: u64, daemon: BorrowedFd<'_>) -> Then {
        let taken = self.workers.take_all(Instant::now() + WORKERS_PATIENCE);
        match self.send_all(request, &taken, daemon) {
            Ok(sessions) => {
                tracing::info!(sessions, "All sessions were surrendered");
                Then::Leave
            }
            Err(error) => {
                tracing::warn!(%error, "A daemon did not take its sessions; they go on");
                self.give_back(taken);
                Then::NextDaemon
            }
        }
    }

    fn send_all(&self, request: u64, taken: &[Moving], daemon: BorrowedFd<'_>) -> io::Result<u64> {
        let served = taken.iter().filter_map(|moving| self.served(moving));
        let opening = self.opening.iter();
        let opened = opening.filter_map(|(name, opening)| being_opened(name, opening));
        let mut sessions = 0;
        for (report, fds) in served.chain(opened) {
            send_patiently(daemon, &report, &fds)?;
            sessions += 1;
        }
        let end = Report::SurrenderedAll { request, sessions };
        send_patiently(daemon, &end, &[])?;
        Ok(sessions)
    }

    /// What to say of a session that a worker served; nothing of one of a plain file.
    fn served<'a>(&self, moving: &'a Moving) -> Option<Surrendered<'a>> {
        let (name, session) = (&moving.name, &moving.session);
        let OfBuild { store, build } = self.owners.get(name)?.of.clone()?;
        let parts = &session.parts;
        let (pidfd, states) = (parts.pidfd.as_fd(), parts.states.as_fd());
        let (succession, fds) = match &parts.guest {
            Guest::Userfaultfd(uffd) => (Succession::Adopt, vec![uffd.as_fd(), pidfd, states]),
            Guest::Postcopy(postcopy) => {
                let fds = vec![postcopy.as_fd(), postcopy.memory(), pidfd, states];
                (Succession::ServePages, fds)
            }
        };
        let reading_set = self.reading_sets.values().any(|(_, of)| of == name);
        let loader = session.background.loader.as_ref();
        let report = Report::Surrendered {
            session: name.clone(),
            store,
            build,
            succession,
            regions: claims_of(&parts.regions),
            tracking: parts.tracking,
            replays: reading_set || session.background.replays(),
            load_bytes_per_second: loader.map(|loader| loader.bytes_per_second),
        };
        Some((report, fds))
    }

    /// Has the workers go on with what was taken from them.
    fn give_back(&self, taken: Vec<Moving>) {
        for mut moving in taken {
            moving.session.start_over();
            if let Some(owner) = self.owners.get(&moving.name) {
                self.workers.tell(owner.worker, Command::Take(moving));
            }
        }
    }
}

/// What to say of a session whose build is being opened; nothing of one whose VMM has not come.
fn being_opened<'a>(name: &str, opening: &'a Opening) -> Option<Surrendered<'a>> {
    let OfBuild { store, build } = opening.of.clone()?;
    let (succession, regions, tracking) = match &opening.begin {
        Begin::Expect(_) => return None,
        Begin::Adopt { regions, tracking } => (Succession::Adopt, regions, *tracking),
        Begin::Postcopy { regions, .. } => (Succession::ServePages, regions, Tracking::Off),
    };
    let (replays, load_bytes_per_second) = ordered(&opening.then);
    let report = Report::Surrendered {
        session: name.to_owned(),
        store,
        build,
        succession,
        regions: regions.clone(),
        tracking,
        replays,
        load_bytes_per_second,
    };
    Some((report, opening.fds.iter().map(AsFd::as_fd).collect()))
}

/// What a session would do ahead of its faults, had it got these orders: whether it would replay,
/// and how fast it would load.
fn ordered(orders: &[Request]) -> (bool, Option<u64>) {
    orders
        .iter()
        .fold((false, None), |(replays, load), order| match order {
            Request::Replay { .. } => (true, load),
            Request::Load {
                bytes_per_second, ..
            } => (replays, Some(*bytes_per_second)),
            Request::Halt { .. } => (false, None),
            _ => (replays, load),
        })
}

/// Sends one report, and waits for room for it: this one may not be dropped.
fn send_patiently(
    daemon: BorrowedFd<'_>,
    report: &Report,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let deadline = Instant::now() + DAEMON_PATIENCE;
    loop {
        match control::send(daemon, report, fds) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => return sent,
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(daemon, PollFlags::POLLOUT)], timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_orders_of_a_session_that_is_being_opened_count() {
        let session = || "s".to_owned();
        let replay = || Request::Replay {
            request: 1,
            session: session(),
        };
        let load = |bytes_per_second| Request::Load {
            request: 2,
            session: session(),
            bytes_per_second,
        };
        let halt = || Request::Halt {
            request: 3,
            session: session(),
        };
        assert_eq!(ordered(&[]), (false, None));
        assert_eq!(ordered(&[replay(), load(5), load(7)]), (true, Some(7)));
        assert_eq!(ordered(&[replay(), load(5), halt()]), (false, None));
        assert_eq!(ordered(&[halt(), replay()]), (true, None));
    }
}
