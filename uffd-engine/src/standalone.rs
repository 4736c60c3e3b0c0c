//! An engine without a daemon: serves every VMM that hands its memory over at one socket, all
//! from the same snapshot. For whoever runs Firecracker by hand.
//!
//! ```text
//!   VMM ──hand-off──▶ socket ──▶ engine's workers        this file plays the daemon:
//!                                   ▲  │ reports           it expects the next VMM as soon
//!                       requests ───┘  ▼                   as one has come, and lets go of
//!                                [`Standalone`]            those that have ended
//! ```
//!
//! Nobody keeps duplicates here: when this process dies, its guests freeze.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use snapshot_format::{BuildId, BuildStore, PageCount, PageSize};
use thiserror::Error;

use crate::control::{self, Report, Request};
use crate::counters::SessionStats;
use crate::page_state::PageStates;
use crate::server::{self, EngineOptions};
use crate::source::{PageSource, SourceError};

/// A VMM that never comes is no mistake here: a year.
const PATIENCE_MS: u64 = 365 * 24 * 3600 * 1000;

/// Makes the number of the request that lets go of a VMM from that VMM's number, which is also
/// the number of the request that expected it.
const LETTING_GO: u64 = 1 << 63;

/// Why nothing can be served.
#[derive(Debug, Error)]
pub enum StandaloneError {
    /// The path is neither a build's directory nor a file.
    #[error("{} is neither a memory file nor the directory of a build", path.display())]
    NoSnapshot {
        /// What was given.
        path: PathBuf,
    },
    /// The snapshot can't be used.
    #[error("Opening {}", path.display())]
    Source {
        /// What was given.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: SourceError,
    },
    /// The store that a build lies in can't be used.
    #[error("Opening the store of {}", path.display())]
    Store {
        /// The build's directory.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: snapshot_format::FormatError,
    },
    /// The build has pages of another size.
    #[error(
        "{} has pages of {} bytes, and not of {}; a build needs no --page-size",
        path.display(), has.bytes(), wanted.bytes()
    )]
    PageSize {
        /// The build's directory.
        path: PathBuf,
        /// Its pages.
        has: PageSize,
        /// Those that were asked for.
        wanted: PageSize,
    },
    /// Somebody serves there.
    #[error("Somebody listens at {} already", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The engine's threads have ended.
    #[error("The engine has ended")]
    Ended,
}

/// What happened, for whoever watches.
#[derive(Clone, Debug)]
pub enum Happening {
    /// A VMM's memory is being served.
    Attached {
        /// Its process.
        pid: i32,
        /// Its number, from 1.
        number: u64,
    },
    /// A hand-off was refused.
    Refused {
        /// Why.
        reason: String,
    },
    /// Some of a guest's memory can't be served any more.
    Failed {
        /// The VMM's number.
        number: u64,
        /// Why.
        reason: String,
    },
    /// A VMM has ended.
    Ended {
        /// Its number.
        number: u64,
        /// What was done for it.
        stats: Box<SessionStats>,
    },
}

/// Where pages come from, as a request names it.
enum Snapshot {
    Build { store: PathBuf, build: BuildId },
    File { file: PathBuf, page_size: PageSize },
}

/// A socket, a snapshot, and the engine between them.
pub struct Standalone {
    snapshot: Snapshot,
    pages: PageCount,
    listener: UnixListener,
    control: OwnedFd,
    next: u64,
    /// Kept for their lifetime, as a daemon would.
    tables: HashMap<u64, PageStates>,
}

impl Standalone {
    /// Opens the snapshot, starts the engine and listens. `page_size` is that of the guests of a memory
    /// file, 4 KiB when absent; a build says its own.
    ///
    /// # Errors
    /// See [`StandaloneError`]; nothing is left behind.
    pub fn start(
        socket: &Path,
        snapshot: &Path,
        page_size: Option<PageSize>,
        options: EngineOptions,
    ) -> Result<Self, StandaloneError> {
        let (snapshot, source) = open(snapshot, page_size)?;
        let listener = listen(socket)?;
        let failed = |operation| move |source| StandaloneError::Io { operation, source };
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(io::Error::from)
        .map_err(failed("Making the engine's socket"))?;
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                if let Err(error) = server::run_connected(&theirs, &options) {
                    tracing::error!(%error, "The engine can't go on");
                }
            })
            .map_err(failed("Starting the engine"))?;
        let mut standalone = Self {
            snapshot,
            pages: source.memory_pages(),
            listener,
            control: ours,
            next: 1,
            tables: HashMap::new(),
        };
        standalone.expect_next()?;
        Ok(standalone)
    }

    /// Waits until something happens.
    ///
    /// # Errors
    /// The engine has ended, or the host is out of memory or descriptors.
    pub fn wait(&mut self) -> Result<Happening, StandaloneError> {
        loop {
            let received = control::receive(self.control.as_fd());
            let report = received.map_err(|source| StandaloneError::Io {
                operation: "Listening to the engine",
                source,
            })?;
            let (report, _duplicates) = report.ok_or(StandaloneError::Ended)?;
            if let Some(happening) = self.note(report)? {
                return Ok(happening);
            }
        }
    }

    fn note(&mut self, report: Report) -> Result<Option<Happening>, StandaloneError> {
        Ok(match report {
            Report::Attached {
                session, peer_pid, ..
            } => {
                self.expect_next()?;
                let (pid, number) = (peer_pid, number_of(&session));
                Some(Happening::Attached { pid, number })
            }
            Report::Refused { request, reason } => {
                // A refusal to let go of what was refused before is the end of it.
                if request & LETTING_GO != 0 {
                    return Ok(None);
                }
                self.tables.remove(&request);
                self.let_go(request)?;
                self.expect_next()?;
                Some(Happening::Refused { reason })
            }
            Report::Failed { session, reason } => Some(Happening::Failed {
                number: number_of(&session),
                reason,
            }),
            Report::Ended { session } => {
                self.let_go(number_of(&session))?;
                None
            }
            Report::Detached { request, stats } => {
                let number = request & !LETTING_GO;
                let stats = Box::new(stats);
                self.tables
                    .remove(&number)
                    .map(|_| Happening::Ended { number, stats })
            }
            // Nobody asks for a surrender here.
            Report::Stats { .. }
            | Report::Recorded { .. }
            | Report::Loaded { .. }
            | Report::Surrendered { .. }
            | Report::SurrenderedAll { .. } => None,
        })
    }

    fn expect_next(&mut self) -> Result<(), StandaloneError> {
        let failed = |operation| move |source| StandaloneError::Io { operation, source };
        let number = self.next;
        self.next += 1;
        let states = PageStates::create(self.pages).map_err(failed("Making a page-state table"))?;
        let (request, session, deadline_ms) = (number, number.to_string(), PATIENCE_MS);
        let message = match &self.snapshot {
            Snapshot::Build { store, build } => Request::Expect {
                request,
                session,
                store: store.clone(),
                build: *build,
                deadline_ms,
            },
            Snapshot::File { file, page_size } => Request::ExpectFile {
                request,
                session,
                file: file.clone(),
                page_bytes: page_size.bytes(),
                deadline_ms,
            },
        };
        let fds = [self.listener.as_fd(), states.as_fd()];
        control::send(self.control.as_fd(), &message, &fds)
            .map_err(failed("Talking to the engine"))?;
        self.tables.insert(number, states);
        Ok(())
    }

    fn let_go(&mut self, number: u64) -> Result<(), StandaloneError> {
        let message = Request::Detach {
            request: number | LETTING_GO,
            session: number.to_string(),
        };
        control::send(self.control.as_fd(), &message, &[]).map_err(|source| StandaloneError::Io {
            operation: "Talking to the engine",
            source,
        })
    }
}

fn number_of(session: &str) -> u64 {
    session.parse().expect("sessions are named by number here")
}

fn open(
    path: &Path,
    page_size: Option<PageSize>,
) -> Result<(Snapshot, Arc<PageSource>), StandaloneError> {
    let failed = |source| StandaloneError::Source {
        path: path.to_path_buf(),
        source,
    };
    let no_snapshot = || StandaloneError::NoSnapshot {
        path: path.to_path_buf(),
    };
    if path.is_file() {
        let page_size = page_size.unwrap_or(PageSize::Size4K);
        let source = PageSource::open_plain(path, page_size).map_err(failed)?;
        let file = path.to_path_buf();
        return Ok((Snapshot::File { file, page_size }, source));
    }
    let real = path.canonicalize().map_err(|_| no_snapshot())?;
    let build = real
        .file_name()
        .and_then(|name| name.to_str()?.parse().ok());
    let (Some(build), Some(store)) = (build, real.parent()) else {
        return Err(no_snapshot());
    };
    let opened = BuildStore::open_or_create(store).map_err(|source| StandaloneError::Store {
        path: path.to_path_buf(),
        source,
    })?;
    let source = PageSource::open(&opened, build).map_err(failed)?;
    if let Some(wanted) = page_size.filter(|wanted| *wanted != source.page_size()) {
        return Err(StandaloneError::PageSize {
            path: path.to_path_buf(),
            has: source.page_size(),
            wanted,
        });
    }
    let store = store.to_path_buf();
    Ok((Snapshot::Build { store, build }, source))
}

/// Listens at a path, in place of a socket that nobody listens at any more.
fn listen(path: &Path) -> Result<UnixListener, StandaloneError> {
    let failed = |source| StandaloneError::Io {
        operation: "Listening for hand-offs",
        source,
    };
    if UnixStream::connect(path).is_ok() {
        return Err(StandaloneError::Taken {
            path: path.to_path_buf(),
        });
    }
    use std::os::unix::fs::FileTypeExt;
    let is_socket = |meta: std::fs::Metadata| meta.file_type().is_socket();
    if std::fs::symlink_metadata(path).is_ok_and(is_socket) {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}
