//! An engine for one guest after the other, told over its control socket as the daemon does.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use appliance::vmm::PageRequests;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::Value;
use snapshot_format::{BuildId, PageCount};
use uffd_engine::PageStates;
use uffd_engine::control::{self, Report, Request};

use crate::child::Child;
use crate::subject::PATIENCE;

/// The engine's process, and the build it serves.
pub(super) struct Serving {
    _engine: Child,
    control: OwnedFd,
    store: PathBuf,
    build: BuildId,
    pages: PageCount,
    sessions: u64,
    states: Option<PageStates>,
}

impl Serving {
    pub(super) fn start(
        dir: &Path,
        store: &Path,
        build: BuildId,
        pages: PageCount,
        cpu: usize,
    ) -> Result<Self> {
        let path = dir.join("control");
        let cpu = cpu.to_string();
        let mut engine = Child::spawn(
            "engine",
            [
                "engine".as_ref(),
                "--cpu".as_ref(),
                cpu.as_ref(),
                "--window-pages".as_ref(),
                "16".as_ref(),
                "--spin-us".as_ref(),
                "0".as_ref(),
                "--control".as_ref(),
                path.as_os_str(),
            ],
        )?;
        let _ready: Value = engine.receive(PATIENCE)?;
        let control = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        connect(control.as_raw_fd(), &UnixAddr::new(&path)?).context("Connecting to the engine")?;
        Ok(Self {
            _engine: engine,
            control,
            store: store.to_owned(),
            build,
            pages,
            sessions: 0,
            states: None,
        })
    }

    /// Waits for a VMM at a socket.
    pub(super) fn expect(&mut self, at: &Path) -> Result<()> {
        let _ = std::fs::remove_file(at);
        let listener = UnixListener::bind(at).context("Binding a hand-off socket")?;
        listener.set_nonblocking(true)?;
        self.sessions += 1;
        let states = PageStates::create(self.pages)?;
        let request = Request::Expect {
            request: self.sessions,
            session: self.sessions.to_string(),
            store: self.store.clone(),
            build: self.build,
            deadline_ms: PATIENCE.as_millis() as u64,
        };
        let fds = [listener.as_fd(), states.as_fd()];
        control::send(self.control.as_fd(), &request, &fds)?;
        self.states = Some(states);
        Ok(())
    }

    /// Answers a VMM that asks for pages.
    pub(super) fn answer(&mut self, asks: &PageRequests) -> Result<()> {
        self.sessions += 1;
        let states = PageStates::create(self.pages)?;
        let request = Request::ServePages {
            request: self.sessions,
            session: self.sessions.to_string(),
            store: self.store.clone(),
            build: self.build,
            regions: asks.regions.clone(),
            surrendered: false,
        };
        let fds = [
            asks.connection.as_fd(),
            asks.memory.as_fd(),
            asks.pidfd.as_fd(),
            states.as_fd(),
        ];
        control::send(self.control.as_fd(), &request, &fds)?;
        self.states = Some(states);
        Ok(())
    }

    /// The VMM has handed over, or is answered.
    pub(super) fn attached(&mut self) -> Result<()> {
        match self.report()? {
            Report::Attached { .. } => Ok(()),
            other => bail!("The engine said {other:?} instead of attaching"),
        }
    }

    /// The VMM has ended.
    pub(super) fn detach(&mut self) -> Result<()> {
        let request = Request::Detach {
            request: u64::MAX - self.sessions,
            session: self.sessions.to_string(),
        };
        control::send(self.control.as_fd(), &request, &[])?;
        loop {
            match self.report()? {
                Report::Detached { stats, .. } => {
                    ensure!(stats.faults > 0, "The guest ran without a fault");
                    return Ok(());
                }
                // It noticed by itself.
                Report::Ended { .. } => {}
                other => bail!("The engine said {other:?} instead of detaching"),
            }
        }
    }

    fn report(&self) -> Result<Report> {
        let received = control::receive(self.control.as_fd())?;
        let (report, _fds) = received.context("The engine closed its socket")?;
        Ok(report)
    }
}
