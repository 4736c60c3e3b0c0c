//! The floor: the least that serves a fault from another process. One fd, one page, two or
//! three system calls: a wait, `read`, `UFFDIO_COPY`, always from one hot page.
//!
//! There are four ways to wait, and the best of a run is its floor. The variants add, one after the other, what any real
//! engine has to do besides: wait for many things at once, copy from where the page really is,
//! and ask whether it is there.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::sched_yield;
use serde::{Deserialize, Serialize};
use uffd_engine::handoff::{self, Progress};
use uffd_engine::region::ClaimedRegion;
use uffd_engine::sys::fdpass;
use uffd_engine::sys::mapping::ReadBuffers;
use uffd_engine::sys::process::die_with_parent;
use uffd_engine::sys::ring::{Ring, Token};

use super::{PATIENCE, Served, Subject};
use crate::args::{Ask, FloorArgs, Wait};
use crate::child::{self, Child};
use crate::config::PAGE_BYTES;
use crate::placement;
use crate::source::{Source, Words};
use crate::sys::copy_page::{copy_page, read_fault};
use crate::sys::page_source::PageSource;

/// Which of an engine's costs a floor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FloorKind {
    /// None: it waits in this way and copies one hot page.
    Bare(Wait),
    /// Waits in an io_uring, and copies each page from the mapped build, in this way.
    RingSource(Option<Ask>),
    /// Waits in `poll`, and reads each page from the disk.
    Disk,
}

impl FloorKind {
    /// The least that works, in the ways there are to wait: the best of them is the floor.
    pub(crate) const BARE: [Self; 4] = [
        Self::Bare(Wait::Poll),
        Self::Bare(Wait::Block),
        Self::Bare(Wait::Busy),
        Self::Bare(Wait::Ring),
    ];

    /// The costs of ours one after the other, and what could replace the last.
    pub(crate) const EXPLAINING: [Self; 3] = [
        Self::RingSource(None),
        Self::RingSource(Some(Ask::Mincore)),
        Self::RingSource(Some(Ask::Nowait)),
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Bare(Wait::Poll) => "floor-poll",
            Self::Bare(Wait::Block) => "floor-block",
            Self::Bare(Wait::Busy) => "floor-busy",
            Self::Bare(Wait::Ring) => "floor-ring",
            Self::Disk => "floor-disk",
            Self::RingSource(Some(Ask::Direct)) => "floor+ring+disk",
            Self::RingSource(None) => "floor+ring+source",
            Self::RingSource(Some(Ask::Mincore)) => "floor+ring+source+mincore",
            Self::RingSource(Some(Ask::Nowait)) => "floor+ring+nowait-read",
        }
    }

    fn args(self, source: &Source) -> Vec<OsString> {
        let mut args = Vec::new();
        let (wait, ask) = match self {
            Self::Bare(wait) => (wait, None),
            Self::RingSource(ask) => (Wait::Ring, Some(ask)),
            Self::Disk => (Wait::Poll, Some(Some(Ask::Direct))),
        };
        args.push(match wait {
            Wait::Poll => "--wait=poll".into(),
            Wait::Block => "--wait=block".into(),
            Wait::Busy => "--wait=busy".into(),
            Wait::Ring => "--wait=ring".into(),
        });
        if let Some(ask) = ask {
            args.extend(["--source".into(), source.data().as_os_str().to_owned()]);
            args.extend(ask.map(|ask| match ask {
                Ask::Mincore => "--ask=mincore".into(),
                Ask::Nowait => "--ask=nowait".into(),
                Ask::Direct => "--ask=direct".into(),
            }));
        }
        args
    }
}

/// What a floor process says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Note {
    Ready,
    Attached,
    Done { faults: u64 },
}

/// A floor process.
#[derive(Debug)]
pub(crate) struct Floor {
    kind: FloorKind,
    child: Child,
    socket: PathBuf,
}

impl Floor {
    /// Starts one; its socket goes into `sockets`.
    pub(crate) fn start(
        kind: FloorKind,
        sockets: &Path,
        source: &Source,
        cpu: usize,
    ) -> Result<Self> {
        let socket = sockets.join(kind.name());
        let mut args: Vec<OsString> = vec!["floor".into()];
        args.extend(["--cpu".into(), cpu.to_string().into()]);
        args.extend(["--socket".into(), socket.clone().into_os_string()]);
        args.extend(kind.args(source));
        let mut child = Child::spawn(kind.name(), args)?;
        match child.receive(PATIENCE)? {
            Note::Ready => Ok(Self {
                kind,
                child,
                socket,
            }),
            other => bail!("The floor began with {other:?}"),
        }
    }
}

impl Subject for Floor {
    fn name(&self) -> &str {
        self.kind.name()
    }

    fn window_pages(&self) -> u64 {
        1
    }

    fn words(&self) -> Words {
        match self.kind {
            FloorKind::Bare(_) => Words::Hot,
            FloorKind::RingSource(_) | FloorKind::Disk => Words::OfBuild,
        }
    }

    fn expect(&mut self) -> Result<PathBuf> {
        Ok(self.socket.clone())
    }

    fn attached(&mut self) -> Result<()> {
        match self.child.receive(PATIENCE)? {
            Note::Attached => Ok(()),
            other => bail!("The floor said {other:?} instead of attaching"),
        }
    }

    fn detach(&mut self) -> Result<Served> {
        match self.child.receive(PATIENCE)? {
            Note::Done { faults } => Ok(Served {
                faults: Some(faults),
                pages_from_disk: match self.kind {
                    FloorKind::Disk => faults,
                    _ => 0,
                },
            }),
            other => bail!("The floor said {other:?} instead of ending its session"),
        }
    }
}

/// The hidden `floor` subcommand.
pub(crate) fn run(args: &FloorArgs) -> Result<()> {
    die_with_parent()?;
    placement::pin(args.cpu)?;
    let listener = UnixListener::bind(&args.socket).context("Listening for hand-offs")?;
    child::say(&Note::Ready)?;
    loop {
        // As fresh for each session as the engine's mapping is.
        let source = open_source(args).context("Opening the build")?;
        let (connection, _) = listener.accept().context("Accepting a hand-off")?;
        let (uffd, region) = receive(&connection)?;
        let mut session = Session {
            uffd: uffd.as_fd(),
            region,
            source,
        };
        child::say(&Note::Attached)?;
        let faults = match args.wait {
            Wait::Poll => session.serve()?,
            Wait::Block => session.serve_blocking()?,
            Wait::Busy => session.serve_busily()?,
            Wait::Ring => session.serve_in_ring()?,
        };
        child::say(&Note::Done { faults })?;
    }
}

fn open_source(args: &FloorArgs) -> io::Result<PageSource> {
    let Some(path) = &args.source else {
        return PageSource::hot(Words::Hot.of(0));
    };
    let file = File::open(path)?;
    match args.ask {
        None => PageSource::mapped(&file),
        Some(Ask::Mincore) => PageSource::asked(&file),
        Some(Ask::Nowait) => PageSource::read(file),
        Some(Ask::Direct) => {
            let direct = File::options()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(path)?;
            PageSource::direct(direct)
        }
    }
}

struct Session<'fd> {
    uffd: BorrowedFd<'fd>,
    region: ClaimedRegion,
    source: PageSource,
}

impl Session<'_> {
    /// Serves every page once, which is all that a round asks for.
    fn serve(&mut self) -> Result<u64> {
        let pages = self.region.size / PAGE_BYTES;
        let mut faults = 0;
        let mut waiting = [PollFd::new(self.uffd, PollFlags::POLLIN)];
        while faults < pages {
            poll(&mut waiting, PollTimeout::NONE)?;
            faults += self.answer()?;
        }
        Ok(faults)
    }

    /// The same, waiting in `read`. The flag belongs to what both processes have open; a
    /// userfaultfd that is polled must not be blocking, and here nobody polls.
    fn serve_blocking(&mut self) -> Result<u64> {
        fcntl(self.uffd, FcntlArg::F_SETFL(OFlag::empty()))?;
        let pages = self.region.size / PAGE_BYTES;
        let mut faults = 0;
        while faults < pages {
            faults += self.answer()?;
        }
        Ok(faults)
    }

    /// The same, never waiting.
    fn serve_busily(&mut self) -> Result<u64> {
        let pages = self.region.size / PAGE_BYTES;
        let mut faults = 0;
        while faults < pages {
            match self.answer()? {
                0 => sched_yield()?,
                answered => faults += answered,
            }
        }
        Ok(faults)
    }

    /// The same, waiting as the engine's workers do.
    fn serve_in_ring(&mut self) -> Result<u64> {
        let pages = self.region.size / PAGE_BYTES;
        let mut ring = Ring::new(8, ReadBuffers::new(1, PAGE_BYTES as usize)?, 0)?;
        let token = Token {
            kind: 0,
            index: 0,
            stamp: 0,
        };
        ring.poll_readable(self.uffd, token)?;
        let mut faults = 0;
        while faults < pages {
            ring.wait(None)?;
            while let Some(completion) = ring.next_completion() {
                if !completion.more {
                    ring.poll_readable(self.uffd, token)?;
                }
                faults += self.answer()?;
            }
        }
        Ok(faults)
    }

    fn answer(&mut self) -> Result<u64> {
        let Some(address) = read_fault(self.uffd).context("Reading a fault")? else {
            return Ok(0);
        };
        let page = (address - self.region.base) / PAGE_BYTES;
        let from = self.source.page(page).context("Finding a page")?;
        copy_page(self.uffd, address, from).context("Copying a page")?;
        Ok(1)
    }
}

fn receive(connection: &UnixStream) -> Result<(OwnedFd, ClaimedRegion)> {
    let mut buffer = vec![0; handoff::MAX_MESSAGE_BYTES];
    let received =
        fdpass::receive(connection.as_fd(), &mut buffer).context("Receiving a hand-off")?;
    // One region is one short message, which a local stream doesn't split.
    let Progress::Complete(regions) = handoff::parse(&buffer[..received.len])? else {
        bail!("The hand-off came in pieces");
    };
    let fd = received.fds.into_iter().next();
    match (fd, &regions[..]) {
        (Some(fd), [region]) => Ok((fd, *region)),
        _ => bail!("The hand-off is not one region with one descriptor"),
    }
}
