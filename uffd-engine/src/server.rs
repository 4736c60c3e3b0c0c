//! The engine process: control socket in, workers out.
//!
//! The control thread does everything that may block or take long (opening and
//! checking a build, accepting a daemon), so that workers only ever serve. It talks to
//! one daemon at a time; when that daemon dies the sessions go on, and the next one
//! may connect.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;
use snapshot_format::{BuildId, BuildStore, PageRun, WorkingSetFile};

use crate::control::{self, Report, Request};
use crate::expecting::Expecting;
use crate::outbox::Outbox;
use crate::page_state::PageStates;
use crate::region::{ClaimedRegion, RegionTable};
use crate::session::SessionParts;
use crate::source::{PageSource, SourceError};
use crate::sys::fdpass;
use crate::sys::uffd::Uffd;
use crate::tracking::Tracking;
use crate::worker::{AheadOrder, Command, Worker, WorkerOptions};

/// How an engine is set up.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// The CPUs to pin workers to, one each; empty means one worker, not pinned.
    pub cpus: Vec<usize>,
    /// Of every worker.
    pub worker: WorkerOptions,
}

struct WorkerHandle {
    inbox: Sender<Command>,
    bell: Arc<EventFd>,
    sessions: usize,
    thread: JoinHandle<()>,
}

impl WorkerHandle {
    fn tell(&self, command: Command) {
        // A worker that has ended took its sessions with it; the daemon sees the process go.
        if self.inbox.send(command).is_ok() {
            let _ = self.bell.write(1);
        }
    }
}

/// Serves daemons that connect to `listener` until one says [`Request::Shutdown`].
///
/// # Errors
/// The listener or the workers' rings can't be used.
pub fn run(listener: &OwnedFd, options: &EngineOptions) -> io::Result<()> {
    let mut engine = Engine::new(options)?;
    loop {
        wait_readable(listener.as_fd())?;
        let connection = match fdpass::accept(listener.as_fd()) {
            Ok(connection) => connection,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        if !engine.serve_daemon(&connection)? {
            engine.stop();
            return Ok(());
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
    engine.serve_daemon(connection)?;
    engine.stop();
    Ok(())
}

fn wait_readable(fd: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE) {
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn start_workers(options: &EngineOptions, outbox: &Outbox) -> io::Result<Vec<WorkerHandle>> {
    let placements: Vec<Option<usize>> = if options.cpus.is_empty() {
        vec![None]
    } else {
        options.cpus.iter().copied().map(Some).collect()
    };
    let (started, outcome) = crossbeam_channel::bounded(placements.len());
    let mut workers = Vec::with_capacity(placements.len());
    for cpu in placements {
        let (inbox, commands) = crossbeam_channel::bounded(256);
        let bell = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?);
        let (their_bell, outbox, worker_options, started) = (
            bell.clone(),
            outbox.clone(),
            options.worker,
            started.clone(),
        );
        let name = cpu.map_or_else(|| "worker".to_owned(), |cpu| format!("worker-{cpu}"));
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let made = pin(cpu)
                .and_then(|()| Worker::new(commands, their_bell, outbox, worker_options, cpu));
            match made {
                Ok(mut worker) => {
                    let _ = started.send(Ok(()));
                    if let Err(error) = worker.run() {
                        // The daemon holds every userfaultfd and starts a successor.
                        tracing::error!(%error, "A worker can't go on");
                        std::process::exit(1);
                    }
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            }
        })?;
        workers.push(WorkerHandle {
            inbox,
            bell,
            sessions: 0,
            thread,
        });
    }
    for _ in &workers {
        outcome.recv().map_err(io::Error::other)??;
    }
    Ok(workers)
}

pub(crate) fn pin(cpu: Option<usize>) -> io::Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// What the control thread knows of a session.
struct Owner {
    /// Which worker serves it.
    worker: usize,
    source: Weak<PageSource>,
}

struct Engine {
    workers: Vec<WorkerHandle>,
    /// Who has which session.
    owners: HashMap<String, Owner>,
    /// Builds that some session is served from.
    sources: HashMap<BuildId, Weak<PageSource>>,
    outbox: Outbox,
}

impl Engine {
    fn new(options: &EngineOptions) -> io::Result<Self> {
        let outbox = Outbox::default();
        Ok(Self {
            workers: start_workers(options, &outbox)?,
            owners: HashMap::new(),
            sources: HashMap::new(),
            outbox,
        })
    }

    /// `false` when the engine is to end.
    fn serve_daemon(&mut self, connection: &OwnedFd) -> io::Result<bool> {
        self.outbox.connect(connection.try_clone()?);
        let goes_on = self.obey_all(connection);
        self.outbox.disconnect();
        Ok(goes_on)
    }

    fn obey_all(&mut self, connection: &OwnedFd) -> bool {
        loop {
            if wait_readable(connection.as_fd()).is_err() {
                return true;
            }
            match control::receive(connection.as_fd()) {
                Ok(Some((Request::Shutdown, _))) => return false,
                Ok(Some((request, fds))) => self.obey(request, fds),
                Ok(None) => return true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "Dropping a daemon that can't be understood");
                    return true;
                }
            }
        }
    }

    fn obey(&mut self, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Expect {
                request,
                session,
                store,
                build,
                deadline_ms,
            } => {
                let deadline = Instant::now() + Duration::from_millis(deadline_ms);
                let made = self
                    .source(&store, build)
                    .and_then(|source| self.expect(&session, source, deadline, fds));
                self.start(request, session, made, expect_command);
            }
            Request::ExpectFile {
                request,
                session,
                file,
                deadline_ms,
            } => {
                let deadline = Instant::now() + Duration::from_millis(deadline_ms);
                let made = PageSource::open_plain(&file)
                    .map_err(|error| crate::chain(&error))
                    .and_then(|source| self.expect(&session, source, deadline, fds));
                self.start(request, session, made, expect_command);
            }
            Request::Adopt {
                request,
                session,
                store,
                build,
                regions,
                tracking,
            } => {
                let made = self.adopt(&session, &store, build, &regions, fds);
                let made = made.map(|(parts, source)| (SessionParts { tracking, ..parts }, source));
                self.start(request, session, made, |request, session, parts| {
                    Command::Adopt {
                        request,
                        session,
                        parts: Box::new(parts),
                    }
                });
            }
            Request::Detach { request, session } => match self.owners.remove(&session) {
                Some(Owner { worker, .. }) => {
                    self.workers[worker].sessions -= 1;
                    self.workers[worker].tell(Command::Detach { request, session });
                }
                None => self.refuse(request, format!("This engine has no session {session:?}")),
            },
            Request::Stats { request, session } => match self.owners.get(&session) {
                Some(owner) => {
                    self.workers[owner.worker].tell(Command::Stats { request, session });
                }
                None => self.refuse(request, format!("This engine has no session {session:?}")),
            },
            Request::Record {
                request,
                session,
                window_ms,
                max_pages,
            } => {
                let window = Duration::from_millis(window_ms);
                let order = AheadOrder::Record { window, max_pages };
                self.ahead(request, session, order);
            }
            Request::Track {
                request,
                session,
                tracking,
            } => self.ahead(request, session, AheadOrder::Track(tracking)),
            Request::EndRecording { request, session } => {
                self.ahead(request, session, AheadOrder::EndRecording);
            }
            Request::Replay { request, session } => {
                let runs = self.working_set_of(&session);
                self.ahead(request, session, AheadOrder::Replay { runs });
            }
            Request::Load {
                request,
                session,
                bytes_per_second,
            } => self.ahead(request, session, AheadOrder::Load { bytes_per_second }),
            Request::Halt { request, session } => {
                self.ahead(request, session, AheadOrder::Halt);
            }
            Request::Shutdown => {}
        }
    }

    fn start<T>(
        &mut self,
        request: u64,
        session: String,
        made: Result<(T, Weak<PageSource>), String>,
        command: impl FnOnce(u64, String, T) -> Command,
    ) {
        let (made, source) = match made {
            Ok(made) => made,
            Err(reason) => return self.refuse(request, reason),
        };
        let idlest = self
            .workers
            .iter()
            .enumerate()
            .min_by_key(|(_, worker)| worker.sessions);
        let (worker, _) = idlest.expect("an engine has at least one worker");
        self.workers[worker].sessions += 1;
        self.owners
            .insert(session.clone(), Owner { worker, source });
        self.workers[worker].tell(command(request, session, made));
    }

    fn ahead(&self, request: u64, session: String, order: AheadOrder) {
        match self.owners.get(&session) {
            Some(owner) => self.workers[owner.worker].tell(Command::Ahead {
                request,
                session,
                order,
            }),
            None => self.refuse(request, format!("This engine has no session {session:?}")),
        }
    }

    /// What there is to replay for a session; a working set that is of no use is none.
    fn working_set_of(&self, session: &str) -> Vec<PageRun> {
        let source = self
            .owners
            .get(session)
            .and_then(|owner| owner.source.upgrade());
        let Some(build) = source.as_ref().and_then(|source| source.build()) else {
            return Vec::new();
        };
        match build.working_set() {
            WorkingSetFile::Present(set) => set.runs().to_vec(),
            WorkingSetFile::Missing => Vec::new(),
            WorkingSetFile::Ignored(reason) => {
                tracing::warn!(build_id = %build.id(), %reason, "Ignoring a working set");
                Vec::new()
            }
        }
    }

    fn refuse(&self, request: u64, reason: String) {
        self.outbox.send(&Report::Refused { request, reason }, &[]);
    }

    fn expect(
        &self,
        session: &str,
        source: Arc<PageSource>,
        deadline: Instant,
        fds: Vec<OwnedFd>,
    ) -> Result<(Expecting, Weak<PageSource>), String> {
        self.check_name(session)?;
        let [listener, states] = take_fds(fds)?;
        let states = PageStates::from_fd(states, source.memory_pages())
            .map_err(|error| error.to_string())?;
        let weak = Arc::downgrade(&source);
        Ok((Expecting::new(listener, states, source, deadline), weak))
    }

    fn adopt(
        &mut self,
        session: &str,
        store: &Path,
        build: BuildId,
        claims: &[ClaimedRegion],
        fds: Vec<OwnedFd>,
    ) -> Result<(SessionParts, Weak<PageSource>), String> {
        self.check_name(session)?;
        let [uffd, pidfd, states] = take_fds(fds)?;
        let source = self.source(store, build)?;
        let (page_size, pages) = (source.page_size(), source.memory_pages());
        let regions = RegionTable::new(claims, page_size.bytes(), pages)
            .map_err(|error| error.to_string())?;
        let states = PageStates::from_fd(states, pages).map_err(|error| error.to_string())?;
        states.forget_reads();
        let uffd = Uffd::from_handed_over(uffd).map_err(|error| error.to_string())?;
        let weak = Arc::downgrade(&source);
        let parts = SessionParts {
            uffd,
            pidfd,
            handoff: None,
            regions,
            states,
            source,
            tracking: Tracking::Off,
        };
        Ok((parts, weak))
    }

    fn check_name(&self, session: &str) -> Result<(), String> {
        if self.owners.contains_key(session) {
            return Err(format!("This engine has a session {session:?} already"));
        }
        Ok(())
    }

    fn source(&mut self, store: &Path, id: BuildId) -> Result<Arc<PageSource>, String> {
        self.open_source(store, id)
            .map_err(|error| crate::chain(&error))
    }

    fn open_source(&mut self, store: &Path, id: BuildId) -> Result<Arc<PageSource>, SourceError> {
        if let Some(source) = self.sources.get(&id).and_then(Weak::upgrade) {
            return Ok(source);
        }
        self.sources.retain(|_, source| source.strong_count() > 0);
        let opened = BuildStore::open_or_create(store)
            .map_err(|source| SourceError::Build { id, source })?;
        let source = PageSource::open(&opened, id)?;
        self.sources.insert(id, Arc::downgrade(&source));
        Ok(source)
    }

    fn stop(self) {
        for worker in &self.workers {
            worker.tell(Command::Stop);
        }
        for worker in self.workers {
            let _ = worker.thread.join();
        }
    }
}

fn expect_command(request: u64, session: String, expecting: Expecting) -> Command {
    Command::Expect {
        request,
        session,
        expecting: Box::new(expecting),
    }
}

fn take_fds<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], String> {
    let count = fds.len();
    fds.try_into()
        .map_err(|_| format!("The request needs {N} descriptors and came with {count}"))
}
