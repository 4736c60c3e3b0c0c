//! The engine process: control socket in, workers out.
//!
//! ```text
//!   daemon ──requests──▶ control thread ──orders──▶ workers ──reports──▶ daemon
//!                          │      ▲
//!                          └ opens builds: itself where the file system is known to answer,
//!                            by threads that may wait elsewhere
//! ```
//!
//! Workers only ever serve. The control thread talks to one daemon at a time; when that daemon
//! dies the sessions go on, and the next one may connect. It may have all of them surrendered to
//! it, for an engine of its own: the sessions lose nothing by that, and this process ends.

mod beginning;
mod opening;
mod parts;
mod requests;
mod sources;
mod surrender;
mod workers;

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Weak;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use snapshot_format::BuildId;

use crate::control::{self, Report, Request};
use crate::outbox::Outbox;
use crate::source::PageSource;
use crate::sys::fdpass;
use crate::worker::WorkerOptions;
use beginning::Opening;
use opening::Openers;
use sources::Sources;
use workers::Workers;
pub(crate) use workers::pin;

/// How an engine is set up.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// The CPUs to pin workers to, one each; empty means one worker, not pinned.
    pub cpus: Vec<usize>,
    /// Of every worker.
    pub worker: WorkerOptions,
    /// A session stays with its worker: somebody has placed its vCPUs beside it. Otherwise idle
    /// sessions move to workers that have fewer.
    pub keep_placement: bool,
}

/// Serves daemons that connect to `listener` until one says [`Request::Shutdown`], or takes the
/// sessions over by [`Request::Surrender`].
///
/// # Errors
/// The listener or the workers' rings can't be used.
pub fn run(listener: &OwnedFd, options: &EngineOptions) -> io::Result<()> {
    let mut engine = Engine::new(options)?;
    loop {
        engine.wait_readable(listener.as_fd())?;
        let connection = match fdpass::accept(listener.as_fd()) {
            Ok(connection) => connection,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        match engine.serve_daemon(&connection)? {
            Then::NextDaemon => {}
            Then::Stop => {
                engine.workers.stop();
                return Ok(());
            }
            Then::Leave => {
                engine.workers.leave();
                return Ok(());
            }
        }
    }
}

/// Serves the one daemon at the other end of `connection`, until it closes it or says
/// [`Request::Shutdown`].
///
/// # Errors
/// The workers' rings can't be used.
pub fn run_connected(connection: &OwnedFd, options: &EngineOptions) -> io::Result<()> {
    let mut engine = Engine::new(options)?;
    match engine.serve_daemon(connection)? {
        Then::NextDaemon | Then::Stop => engine.workers.stop(),
        Then::Leave => engine.workers.leave(),
    }
    Ok(())
}

/// What comes when a daemon has gone.
enum Then {
    /// The sessions go on.
    NextDaemon,
    /// They end.
    Stop,
    /// They have gone with it, and nothing is worth waiting for.
    Leave,
}

/// The build that a session is served from.
#[derive(Clone, Debug)]
struct OfBuild {
    store: PathBuf,
    build: BuildId,
}

/// What the control thread knows of a session.
struct Owner {
    /// Which worker serves it.
    worker: usize,
    source: Weak<PageSource>,
    /// `None` for a plain file.
    of: Option<OfBuild>,
}

struct Engine {
    workers: Workers,
    /// Who has which session.
    owners: HashMap<String, Owner>,
    /// Sessions whose build is being opened.
    opening: HashMap<String, Opening>,
    sources: Sources,
    openers: Openers,
    /// Stores on file systems that answer: the control thread opens their builds itself.
    prompt_stores: HashSet<PathBuf>,
    /// Working sets that are being read, by the opener's number: for which request and session.
    reading_sets: HashMap<u64, (u64, String)>,
    outbox: Outbox,
    keep_placement: bool,
}

impl Engine {
    fn new(options: &EngineOptions) -> io::Result<Self> {
        let outbox = Outbox::default();
        Ok(Self {
            workers: Workers::start(options, &outbox)?,
            owners: HashMap::new(),
            opening: HashMap::new(),
            sources: Sources::default(),
            openers: Openers::new()?,
            prompt_stores: HashSet::new(),
            reading_sets: HashMap::new(),
            outbox,
            keep_placement: options.keep_placement,
        })
    }

    fn serve_daemon(&mut self, connection: &OwnedFd) -> io::Result<Then> {
        self.outbox.connect(connection.try_clone()?);
        let then = self.obey_all(connection);
        self.outbox.disconnect();
        Ok(then)
    }

    fn obey_all(&mut self, connection: &OwnedFd) -> Then {
        loop {
            if self.wait_readable(connection.as_fd()).is_err() {
                return Then::NextDaemon;
            }
            match control::receive(connection.as_fd()) {
                Ok(Some((Request::Shutdown, _))) => return Then::Stop,
                Ok(Some((Request::Surrender { request }, _))) => {
                    return self.surrender(request, connection.as_fd());
                }
                Ok(Some((request, fds))) => self.obey(request, fds),
                Ok(None) => return Then::NextDaemon,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "Dropping a daemon that can't be understood");
                    return Then::NextDaemon;
                }
            }
        }
    }

    /// Waits for a descriptor, and goes on meanwhile with what is opened.
    fn wait_readable(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        loop {
            let deadlines = self.opening.values().filter_map(Opening::deadline);
            let due = deadlines.chain(self.sources.next_due()).min();
            let timeout = due.map_or(PollTimeout::NONE, |due| {
                let left = due.saturating_duration_since(Instant::now());
                // Rounded up: waking early would be waking often.
                PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
            });
            let mut fds = [
                PollFd::new(fd, PollFlags::POLLIN),
                PollFd::new(self.openers.bell(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [asked, opened] = fds.map(|fd| fd.any() == Some(true));
            if opened {
                self.go_on_opened();
            }
            let now = Instant::now();
            self.give_up_opening(now);
            self.sources.let_go(now);
            if asked {
                return Ok(());
            }
        }
    }

    /// Moves idle sessions until the workers have as many each as they can.
    fn even_out(&mut self) {
        while !self.keep_placement
            && let Some((session, worker)) = self.workers.even_out()
        {
            tracing::debug!(session, worker, "Moved");
            if let Some(owner) = self.owners.get_mut(&session) {
                owner.worker = worker;
            }
        }
    }

    fn refuse(&self, request: u64, reason: String) {
        self.outbox.send(&Report::Refused { request, reason }, &[]);
    }
}
