//! Our engine, as the daemon runs it: a process of its own with a pinned worker, told over
//! the control socket what to expect.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use serde::{Deserialize, Serialize};
use snapshot_format::{BuildId, PageCount};
use uffd_engine::control::{self, Report, Request};
use uffd_engine::server::{self, EngineOptions};
use uffd_engine::sys::process::die_with_parent;
use uffd_engine::{PageStates, SessionStats, Waiting, WorkerOptions};

use super::{PATIENCE, Served, Subject};
use crate::args::EngineArgs;
use crate::child::{self, Child};
use crate::placement;
use crate::source::{Source, Words};

/// What the engine process says before it serves.
#[derive(Debug, Serialize, Deserialize)]
struct Ready;

/// An engine process with one worker, and the daemon's end of its control socket.
#[derive(Debug)]
pub(crate) struct Ours {
    name: String,
    window_pages: u64,
    child: Child,
    control: OwnedFd,
    sockets: PathBuf,
    store: PathBuf,
    build: BuildId,
    pages: u64,
    sessions: u64,
    /// What a daemon keeps while sessions live.
    kept: Vec<Kept>,
}

/// One session, as a daemon knows it.
#[derive(Debug)]
struct Kept {
    session: String,
    _states: PageStates,
    uffd: Vec<OwnedFd>,
}

impl Ours {
    /// How many pages an engine installs around a fault unless told otherwise.
    pub(crate) fn default_window() -> u64 {
        WorkerOptions::default().window_pages
    }

    /// Starts an engine that serves `pages` pages from `source`.
    pub(crate) fn start(
        window_pages: u64,
        sockets: &Path,
        source: &Source,
        pages: u64,
        cpu: usize,
    ) -> Result<Self> {
        Self::start_waiting(0, window_pages, sockets, source, pages, cpu)
    }

    /// The same with a worker that spins.
    pub(crate) fn start_waiting(
        spin_us: u64,
        window_pages: u64,
        sockets: &Path,
        source: &Source,
        pages: u64,
        cpu: usize,
    ) -> Result<Self> {
        let name = match (spin_us, window_pages) {
            (0, 1) => "ours".to_owned(),
            (0, window) => format!("ours-window-{window}"),
            (us, _) => format!("ours-spin-{us}"),
        };
        let path = sockets.join(format!("{name}-control"));
        let mut child = Child::spawn(
            "engine",
            [
                "engine".as_ref(),
                "--cpu".as_ref(),
                cpu.to_string().as_ref(),
                "--window-pages".as_ref(),
                window_pages.to_string().as_ref(),
                "--spin-us".as_ref(),
                spin_us.to_string().as_ref(),
                "--control".as_ref(),
                path.as_os_str(),
            ],
        )?;
        let Ready = child.receive(PATIENCE)?;
        let control = packet_socket(SockFlag::empty())?;
        connect(control.as_raw_fd(), &UnixAddr::new(&path)?).context("Connecting to the engine")?;
        Ok(Self {
            name,
            window_pages,
            child,
            control,
            sockets: sockets.to_path_buf(),
            store: source.store_root().to_path_buf(),
            build: source.build(),
            pages,
            sessions: 0,
            kept: Vec::new(),
        })
    }

    fn session(&self) -> String {
        format!("{}-{}", self.name, self.sessions)
    }

    /// The engine's process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Sends one request about the session that was expected last; its answer.
    pub(crate) fn ask(&mut self, request: impl FnOnce(u64, String) -> Request) -> Result<Report> {
        self.sessions += 1;
        let kept = self.kept.last().context("There is no session")?;
        let request = request(self.sessions, kept.session.clone());
        control::send(self.control.as_fd(), &request, &[]).context("Telling the engine")?;
        Ok(self.report()?.0)
    }

    /// Waits until a load has ended.
    pub(crate) fn wait_loaded(&self) -> Result<()> {
        match self.report()?.0 {
            Report::Loaded { .. } => Ok(()),
            other => bail!("The engine said {other:?} instead of having loaded"),
        }
    }

    /// Waits until the engine knows that a VMM has ended.
    pub(crate) fn wait_ended(&self) -> Result<()> {
        match self.report()?.0 {
            Report::Ended { .. } => Ok(()),
            other => bail!("The engine said {other:?} instead of a VMM's end"),
        }
    }

    /// Ends all sessions; the counters of each.
    pub(crate) fn end(&mut self) -> Result<Vec<SessionStats>> {
        let mut all = Vec::new();
        for kept in std::mem::take(&mut self.kept) {
            self.sessions += 1;
            let request = Request::Detach {
                request: self.sessions,
                session: kept.session.clone(),
            };
            control::send(self.control.as_fd(), &request, &[]).context("Telling the engine")?;
            match self.report()?.0 {
                Report::Detached { stats, .. } => all.push(stats),
                Report::Failed { reason, .. } => bail!("The engine failed a session: {reason}"),
                other => bail!("The engine said {other:?} instead of detaching"),
            }
        }
        Ok(all)
    }

    fn report(&self) -> Result<(Report, Vec<OwnedFd>)> {
        if !child::readable(self.control.as_fd(), PATIENCE)? {
            bail!("The engine reported nothing for {} s", PATIENCE.as_secs());
        }
        let report = control::receive(self.control.as_fd()).context("Listening to the engine")?;
        report.context("The engine has ended; what it said is above")
    }
}

impl Subject for Ours {
    fn name(&self) -> &str {
        &self.name
    }

    fn window_pages(&self) -> u64 {
        self.window_pages
    }

    fn words(&self) -> Words {
        Words::OfBuild
    }

    fn expect(&mut self) -> Result<PathBuf> {
        self.sessions += 1;
        let session = self.session();
        let path = self.sockets.join(&session);
        let listener = UnixListener::bind(&path).context("Listening for a hand-off")?;
        listener.set_nonblocking(true)?;
        let states = PageStates::create(PageCount::new(self.pages))?;
        let request = Request::Expect {
            request: self.sessions,
            session,
            store: self.store.clone(),
            build: self.build,
            deadline_ms: u64::try_from(PATIENCE.as_millis())?,
        };
        let fds = [listener.as_fd(), states.as_fd()];
        control::send(self.control.as_fd(), &request, &fds).context("Telling the engine")?;
        self.kept.push(Kept {
            session: self.session(),
            _states: states,
            uffd: Vec::new(),
        });
        Ok(path)
    }

    fn attached(&mut self) -> Result<()> {
        match self.report()? {
            (Report::Attached { .. }, fds) => {
                if let Some(kept) = self.kept.last_mut() {
                    kept.uffd = fds;
                }
                Ok(())
            }
            (Report::Refused { reason, .. }, _) => bail!("The engine refused: {reason}"),
            (other, _) => bail!("The engine said {other:?} instead of attaching"),
        }
    }

    fn detach(&mut self) -> Result<Served> {
        let mut served = Served {
            faults: Some(0),
            pages_from_disk: 0,
        };
        for stats in self.end()? {
            if stats.pages_installed != self.pages {
                bail!(
                    "The engine says that it installed {} of {} pages",
                    stats.pages_installed,
                    self.pages
                );
            }
            served.faults = served.faults.map(|faults| faults + stats.faults);
            served.pages_from_disk += stats.pages_read;
        }
        Ok(served)
    }
}

/// The hidden `engine` subcommand.
pub(crate) fn run(args: &EngineArgs) -> Result<()> {
    die_with_parent()?;
    // The engine pins its worker itself. Here it is only found out whether that will work, in
    // words that say what to do; the control thread stays free.
    std::thread::scope(|scope| scope.spawn(|| placement::pin(args.cpu)).join())
        .map_err(|_| anyhow::anyhow!("Pinning panicked"))??;
    let listener = packet_socket(SockFlag::SOCK_NONBLOCK)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(&args.control)?)?;
    listen(&listener, Backlog::new(1)?)?;
    child::say(&Ready)?;
    let options = EngineOptions {
        cpus: vec![args.cpu],
        worker: WorkerOptions {
            window_pages: args.window_pages,
            waiting: Waiting::spinning(args.spin_us),
            ..WorkerOptions::default()
        },
        ..EngineOptions::default()
    };
    server::run(&listener, &options).context("Running the engine")
}

fn packet_socket(flags: SockFlag) -> Result<OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        flags,
        None,
    )?)
}
