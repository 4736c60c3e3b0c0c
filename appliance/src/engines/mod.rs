//! The daemon's side of its engines: one process per NUMA node, spawned, watched, and
//! replaced when it dies.
//!
//! What a session needs to survive its engine is kept here: a duplicate of its
//! userfaultfd, the VMM's pidfd, the page-state table and the regions. When an engine's
//! socket closes, a successor is started at once and adopts every session; the guests'
//! vCPUs wait in the kernel meanwhile and go on.
//!
//! Engines outlive their daemon, and so do its guests. The next daemon starts engines of its own,
//! which take all sessions over; whoever knows their sandboxes claims them, and what nobody claims
//! is detached. Where an engine has died with its daemon, sessions are gone on with from what
//! that daemon has left in writing, and from what their VMMs have.

mod ahead;
mod inheritance;
mod kept;
mod link;
mod tables;
pub mod topology;
mod userfaultfd;
mod will;
mod working_sets;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use snapshot_format::BuildId;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use uffd_engine::control::{Report, Request};
use uffd_engine::{PageStates, SessionStats, Tracking};

use crate::config::EngineConfig;
use crate::vmm::PageRequests;
pub use ahead::Ahead;
pub use inheritance::Inherited;
use kept::{Kept, KeptMemory, KeptVmm};
use link::Link;
pub use tables::{Tables, path as table_path};
pub use topology::Node;
pub use userfaultfd::UserfaultfdError;
pub use will::{Lost, Orphan, Will};
pub use working_sets::{Order, WorkingSets};

/// How long an engine may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an engine did not do what it was asked.
#[derive(Debug, Error)]
pub enum EngineError {
    /// Its process could not be started or reached.
    #[error("Starting the engine of node {node}")]
    Start {
        /// Which node.
        node: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It refused.
    #[error("The engine refused: {reason}")]
    Refused {
        /// What it said.
        reason: String,
    },
    /// It died before it answered.
    #[error("The engine ended before it answered; a new one has been started, try again")]
    Lost,
    /// A descriptor could not be kept.
    #[error("Keeping a descriptor of a VMM")]
    Descriptor {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It did not answer.
    #[error("The engine did not answer within {} s", ANSWER_TIMEOUT.as_secs())]
    Timeout,
}

/// What an engine says about a session without being asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// Some of its memory can't be served any more.
    Failed(String),
}

/// All engines of this host. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Engines {
    links: Arc<Vec<Arc<Link>>>,
    working_sets: Arc<WorkingSets>,
}

impl Engines {
    /// Starts one engine per node. They go on with the sessions of the engines whose daemon was in
    /// `run_dir` before and has died.
    ///
    /// # Errors
    /// One could not be started; the others are ended.
    pub fn start(
        run_dir: &Path,
        nodes: &[Node],
        config: &EngineConfig,
    ) -> Result<Self, EngineError> {
        Self::start_program(Path::new("/proc/self/exe"), run_dir, nodes, config)
    }

    /// As [`Self::start`], with engines of another program than this process runs.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_program(
        program: &Path,
        run_dir: &Path,
        nodes: &[Node],
        config: &EngineConfig,
    ) -> Result<Self, EngineError> {
        let mut strays = inheritance::strays(run_dir, nodes);
        let working_sets = Arc::new(WorkingSets::default());
        let mut links: Vec<Arc<Link>> = Vec::new();
        for node in nodes {
            let sets = working_sets.clone();
            // The first one takes what is nobody's.
            let strays = std::mem::take(&mut strays);
            let paths = (program, run_dir);
            match Link::start(paths, node.clone(), config.clone(), sets, &strays) {
                Ok(link) => links.push(link),
                Err(error) => {
                    // Those that have taken a guest over keep it, for a start that succeeds.
                    let idle = links.iter().filter(|link| link.sessions() == 0);
                    idle.for_each(|link| link.stop());
                    return Err(error);
                }
            }
        }
        Ok(Self {
            links: Arc::new(links),
            working_sets,
        })
    }

    /// The sessions that were taken over from a daemon that has died, and that nobody has claimed
    /// yet.
    #[must_use]
    pub fn inherited(&self) -> Vec<String> {
        let all = self.links.iter().flat_map(|link| link.inherited());
        let mut all: Vec<_> = all.collect();
        all.sort();
        all
    }

    /// One of those, for whoever goes on with its sandbox. Everybody else gets `None`.
    #[must_use]
    pub fn claim_inherited(&self, session: &str) -> Option<Inherited> {
        self.links.iter().find_map(|link| {
            let look = |kept: &Kept| (kept.states.clone(), kept.build, kept.tracking);
            let (events, (states, build, tracking)) = link.claim(session, look)?;
            Some(Inherited {
                attachment: Attachment::new(link.clone(), session),
                events,
                states,
                build,
                tracking,
            })
        })
    }

    /// Detaches those that nobody has claimed.
    pub fn drop_inherited(&self) {
        for session in self.inherited() {
            tracing::warn!(session, "Nobody goes on with a session");
            drop(self.claim_inherited(&session));
        }
    }

    /// What their sessions touch first.
    #[must_use]
    pub fn working_sets(&self) -> &Arc<WorkingSets> {
        &self.working_sets
    }

    /// Ends them and waits until they have; for the daemon's end, when no guest is left.
    pub fn stop(&self) {
        for link in self.links.iter() {
            link.stop();
        }
    }

    /// The names of all sessions, and the counters of those whose engine answers within this time.
    pub async fn sessions(
        &self,
        patience: Duration,
    ) -> (BTreeSet<String>, BTreeMap<String, SessionStats>) {
        let (mut names, mut asked) = (BTreeSet::new(), Vec::new());
        for link in self.links.iter() {
            for session in link.names() {
                names.insert(session.clone());
                let wanted = session.clone();
                let request = |request| Request::Stats {
                    request,
                    session: wanted,
                };
                if let Ok(answer) = link.ask(request, &[]) {
                    asked.push((session, answer));
                }
            }
        }
        let deadline = tokio::time::Instant::now() + patience;
        let mut said = BTreeMap::new();
        for (session, answer) in asked {
            let answer = tokio::time::timeout_at(deadline, answer).await;
            if let Ok(Ok(Report::Stats { stats, .. })) = answer {
                said.insert(session, stats);
            }
        }
        (names, said)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.links.len()
    }

    /// Has the least busy engine wait for a VMM.
    ///
    /// # Errors
    /// It refused, or is not there.
    pub fn expect(
        &self,
        wanted: Wanted<'_>,
    ) -> Result<(Expected, mpsc::Receiver<SessionEvent>), EngineError> {
        let Wanted {
            session,
            store,
            build,
            states,
            socket,
            deadline,
        } = wanted;
        let idlest = self.links.iter().min_by_key(|link| link.sessions());
        let link = idlest.ok_or(EngineError::Lost)?.clone();
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|source| EngineError::Start {
                node: link.node(),
                source,
            })?;
        let (events, inbox) = mpsc::channel(8);
        let fds = [listener.as_fd(), states.as_fd()];
        let kept = Kept {
            store: store.to_owned(),
            build,
            states: states.clone(),
            events,
            attached: None,
            tracking: Tracking::Off,
            replays: false,
            load_bytes_per_second: None,
        };
        let request = |request| Request::Expect {
            request,
            session: session.to_owned(),
            store: store.to_owned(),
            build,
            deadline_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
        };
        let answer = link.ask_for_session(session, kept, request, &fds)?;
        let attachment = Attachment::new(link, session);
        let expected = Expected {
            coming: Coming::Handoff(attachment, answer),
            deadline,
        };
        Ok((expected, inbox))
    }

    /// Has the least busy engine serve a VMM that will ask for pages, once it says so.
    ///
    /// # Errors
    /// There is no engine.
    pub fn expect_requests(
        &self,
        wanted: Wanted<'_>,
        asked: oneshot::Receiver<PageRequests>,
    ) -> Result<(Expected, mpsc::Receiver<SessionEvent>), EngineError> {
        let idlest = self.links.iter().min_by_key(|link| link.sessions());
        let link = idlest.ok_or(EngineError::Lost)?.clone();
        let (events, inbox) = mpsc::channel(8);
        let coming = Coming::Requests(Box::new(Requests {
            link,
            asked,
            session: wanted.session.to_owned(),
            store: wanted.store.to_owned(),
            build: wanted.build,
            states: wanted.states,
            events,
        }));
        let deadline = wanted.deadline;
        Ok((Expected { coming, deadline }, inbox))
    }
}

/// A session that is to be.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// Its name; unique among sessions.
    pub session: &'a str,
    /// The directory of builds.
    pub store: &'a Path,
    /// The build whose memory is served.
    pub build: BuildId,
    /// What happens to each page.
    pub states: Arc<PageStates>,
    /// Where the VMM will hand its memory over.
    pub socket: &'a Path,
    /// How long it may take to.
    pub deadline: Duration,
}

/// A VMM that is waited for. Dropping it calls it off.
#[derive(Debug)]
pub struct Expected {
    coming: Coming,
    deadline: Duration,
}

#[derive(Debug)]
enum Coming {
    /// It hands its memory over to an engine that waits for it.
    Handoff(Attachment, oneshot::Receiver<Report>),
    /// It asks for pages, and says first where.
    Requests(Box<Requests>),
}

/// What a session of page requests begins with.
#[derive(Debug)]
struct Requests {
    link: Arc<Link>,
    asked: oneshot::Receiver<PageRequests>,
    session: String,
    store: PathBuf,
    build: BuildId,
    states: Arc<PageStates>,
    events: mpsc::Sender<SessionEvent>,
}

impl Requests {
    /// Waits until the VMM says where it asks, and has the engine answer there.
    async fn begin(self) -> Result<(Attachment, oneshot::Receiver<Report>), EngineError> {
        let Ok(asks) = self.asked.await else {
            // Whoever starts it has failed, and says why.
            return std::future::pending().await;
        };
        let kept = |fd: &OwnedFd| {
            fd.try_clone()
                .map_err(|source| EngineError::Descriptor { source })
        };
        let kept = Kept {
            store: self.store.clone(),
            build: self.build,
            states: self.states.clone(),
            events: self.events,
            attached: Some(KeptVmm {
                memory: KeptMemory::Requests {
                    connection: kept(&asks.connection)?,
                    memory: kept(&asks.memory)?,
                    surrendered: false,
                },
                pidfd: kept(&asks.pidfd)?,
                regions: asks.regions.clone(),
            }),
            tracking: Tracking::Off,
            replays: false,
            load_bytes_per_second: None,
        };
        let request = |request| Request::ServePages {
            request,
            session: self.session.clone(),
            store: self.store,
            build: self.build,
            regions: asks.regions,
            surrendered: false,
        };
        let fds = [
            asks.connection.as_fd(),
            asks.memory.as_fd(),
            asks.pidfd.as_fd(),
            self.states.as_fd(),
        ];
        let answer = self
            .link
            .ask_for_session(&self.session, kept, request, &fds)?;
        Ok((Attachment::new(self.link, &self.session), answer))
    }
}

impl Expected {
    /// Waits for the VMM.
    ///
    /// # Errors
    /// It was refused, did not come, or the engine died; nothing is attached.
    pub async fn attached(self) -> Result<Attachment, EngineError> {
        let attaching = async {
            let (mut attachment, answer) = match self.coming {
                Coming::Handoff(attachment, answer) => (attachment, answer),
                Coming::Requests(requests) => requests.begin().await?,
            };
            match answer.await {
                Err(_) => Err(EngineError::Lost),
                Ok(Report::Attached { worker_cpu, .. }) => {
                    attachment.worker_cpu = worker_cpu;
                    Ok(attachment)
                }
                Ok(report) => Err(refusal(report)),
            }
        };
        let in_time = timeout(self.deadline + ANSWER_TIMEOUT, attaching).await;
        in_time.unwrap_or(Err(EngineError::Timeout))
    }
}

/// A session that an engine serves. Dropping it detaches without waiting.
#[derive(Debug)]
pub struct Attachment {
    link: Arc<Link>,
    session: String,
    worker_cpu: Option<usize>,
    detached: bool,
}

impl Attachment {
    fn new(link: Arc<Link>, session: &str) -> Self {
        Self {
            link,
            session: session.to_owned(),
            worker_cpu: None,
            detached: false,
        }
    }

    /// The CPU that its faults are answered on, if that is one. Of the engine it was attached to:
    /// a successor may place it elsewhere.
    #[must_use]
    pub const fn worker_cpu(&self) -> Option<usize> {
        self.worker_cpu
    }

    /// What its engine calls it.
    #[must_use]
    pub fn session(&self) -> &str {
        &self.session
    }

    /// Its counters now. They start anew with a successor engine.
    ///
    /// # Errors
    /// The engine is not there.
    pub async fn stats(&self) -> Result<SessionStats, EngineError> {
        let session = self.session.clone();
        match self
            .ask(|request| Request::Stats { request, session })
            .await?
        {
            Report::Stats { stats, .. } => Ok(stats),
            report => Err(refusal(report)),
        }
    }

    /// Ends the session; returns its last counters. Only after the VMM's end.
    ///
    /// # Errors
    /// The engine is not there; the session is forgotten all the same.
    pub async fn detach(mut self) -> Result<SessionStats, EngineError> {
        self.detached = true;
        self.link.forget(&self.session);
        let session = self.session.clone();
        match self
            .ask(|request| Request::Detach { request, session })
            .await?
        {
            Report::Detached { stats, .. } => Ok(stats),
            report => Err(refusal(report)),
        }
    }

    async fn ask(&self, request: impl FnOnce(u64) -> Request) -> Result<Report, EngineError> {
        let answer = self.link.ask(request, &[])?;
        match timeout(ANSWER_TIMEOUT, answer).await {
            Err(_) => Err(EngineError::Timeout),
            Ok(Err(_)) => Err(EngineError::Lost),
            Ok(Ok(report)) => Ok(report),
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if !self.detached {
            self.link.forget(&self.session);
            let session = self.session.clone();
            let _ = self
                .link
                .ask(|request| Request::Detach { request, session }, &[]);
        }
    }
}

fn refusal(report: Report) -> EngineError {
    match report {
        Report::Refused { reason, .. } => EngineError::Refused { reason },
        other => EngineError::Refused {
            reason: format!("unexpected answer {other:?}"),
        },
    }
}

/// Where an engine's control socket is.
#[must_use]
pub fn control_socket(run_dir: &Path, node: u32) -> PathBuf {
    run_dir.join(format!("engine-{node}.sock"))
}

/// Where it is until it has its predecessor's place.
fn new_socket(run_dir: &Path, node: u32) -> PathBuf {
    run_dir.join(format!("engine-{node}.new.sock"))
}
