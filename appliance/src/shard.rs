//! One core's thread of the daemon: its runtime, its listener, and the sandboxes it owns.
//!
//! A sandbox belongs to the shard that its id hashes to, for ever. Requests arrive at any
//! shard and reach the owner through its bounded mailbox; here they are judged, and handed
//! to the sandbox's own task. Nothing in this loop waits.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use http_api::ApiError;
use http_api::ids::SandboxId;
use http_api::wire::{
    DiskStats, MemoryStats, NetworkPolicy, ResumeSandbox, Sandbox, SandboxState, SetTimeout,
    Snapshot,
};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::catalogue::SandboxRow;
use crate::host::Host;
use crate::sandbox::state::{Operation, begin};
use crate::sandbox::{Cell, Connection, Job, NewTemplate, Owner, Reply};
use crate::template::Template;

/// Jobs that one sandbox may have waiting.
const JOBS_PER_SANDBOX: usize = 16;

/// How many sandboxes are written to disk at the same time when the daemon stops.
const PAUSES_AT_ONCE: usize = 4;

/// The way to a running guest, for as long as it stays running.
pub struct Route {
    /// Where it is.
    pub address: Ipv4Addr,
    /// What its daemon asks callers for.
    pub access_token: Option<String>,
    /// Tells when it no longer runs.
    pub state: watch::Receiver<SandboxState>,
    /// Tells when it has to be left; counted until it is dropped.
    pub connection: Connection,
}

impl Route {
    /// Waits until the guest has to be left, and says what its sandbox is then. A pause says when:
    /// what ends soon has time to.
    pub async fn left(&mut self) -> SandboxState {
        use SandboxState::{Destroying, Pausing, Running, Snapshotting};
        let stays = |state: &SandboxState| matches!(state, Running | Snapshotting | Pausing);
        let now = self.state.clone();
        tokio::select! {
            left = self.state.wait_for(|state| !stays(state)) => {
                left.map_or(Destroying, |state| *state)
            }
            () = self.connection.closed() => *now.borrow(),
        }
    }
}

/// What a shard is asked.
pub enum Request {
    /// Make a sandbox; its row is in the catalogue.
    Create(Box<SandboxRow>, Box<Template>, Reply<Sandbox>),
    /// All of this shard's.
    List(Reply<Vec<Sandbox>>),
    /// One.
    Get(SandboxId, Reply<Sandbox>),
    /// Its row, with what the outside doesn't see.
    Row(SandboxId, Reply<Box<SandboxRow>>),
    /// Its changes of state.
    Watch(SandboxId, Reply<watch::Receiver<SandboxState>>),
    /// To disk.
    Pause(SandboxId, Reply<Sandbox>),
    /// Back.
    Resume(SandboxId, ResumeSandbox, Reply<Sandbox>),
    /// Longer or shorter.
    Timeout(SandboxId, SetTimeout, Reply<Sandbox>),
    /// A template of it.
    Snapshot(SandboxId, NewTemplate, Reply<Snapshot>),
    /// What its memory did.
    Memory(SandboxId, Reply<MemoryStats>),
    /// What its disk takes.
    Disk(SandboxId, Reply<DiskStats>),
    /// Let it reach other networks.
    Network(SandboxId, NetworkPolicy, Reply<Sandbox>),
    /// The way to its guest.
    Route(SandboxId, Reply<Route>),
    /// Away with it.
    Destroy(SandboxId, Reply<()>),
    /// Pause all that run and take no more; answered when no VMM is left.
    Drain(Reply<()>),
}

struct Entry {
    cell: Cell,
    jobs: mpsc::Sender<Job>,
}

/// The shard's state.
pub struct Shard {
    host: Arc<Host>,
    entries: BTreeMap<SandboxId, Entry>,
    owners: JoinSet<SandboxId>,
}

impl Shard {
    /// A shard that owns these sandboxes, none of which has a VMM.
    #[must_use]
    pub fn new(host: Arc<Host>, sandboxes: Vec<Cell>) -> Self {
        let mut shard = Self {
            host,
            entries: BTreeMap::new(),
            owners: JoinSet::new(),
        };
        for cell in sandboxes {
            let owner = Owner::new(shard.host.clone(), cell.clone());
            shard.adopt(cell, |jobs| owner.serve(jobs));
        }
        shard
    }

    /// Serves requests until the mailbox closes, then waits for the owners.
    pub async fn run(mut self, mut mailbox: mpsc::Receiver<Request>) {
        loop {
            tokio::select! {
                request = mailbox.recv() => match request {
                    Some(request) => self.answer(request),
                    None => break,
                },
                Some(ended) = self.owners.join_next() => {
                    if let Ok(id) = ended {
                        self.entries.remove(&id);
                    }
                }
            }
        }
        self.entries.clear();
        while self.owners.join_next().await.is_some() {}
    }

    fn answer(&mut self, request: Request) {
        match request {
            Request::Create(row, template, reply) => self.create(*row, *template, reply),
            Request::List(reply) => {
                let present = self.entries.values().filter(|entry| !entry.cell.is_gone());
                let _ = reply.send(Ok(present.map(|entry| entry.cell.view()).collect()));
            }
            Request::Get(id, reply) => {
                let _ = reply.send(self.find(&id).map(|entry| entry.cell.view()));
            }
            Request::Row(id, reply) => {
                let _ = reply.send(self.find(&id).map(|entry| Box::new(entry.cell.row())));
            }
            Request::Watch(id, reply) => {
                let _ = reply.send(self.find(&id).map(|entry| entry.cell.watch()));
            }
            Request::Pause(id, reply) => self.hand_on(&id, Operation::Pause, reply, Job::Pause),
            Request::Resume(id, request, reply) => {
                self.hand_on(&id, Operation::Resume, reply, |reply| {
                    Job::Resume(request, reply)
                });
            }
            Request::Timeout(id, request, reply) => match self.find(&id).and_then(has_room) {
                Ok(entry) => send(entry, Job::Timeout(request, reply)),
                Err(error) => drop(reply.send(Err(error))),
            },
            Request::Snapshot(id, name, reply) => {
                self.hand_on(&id, Operation::Snapshot, reply, |reply| {
                    Job::Snapshot(name, reply)
                });
            }
            Request::Destroy(id, reply) => {
                self.hand_on(&id, Operation::Destroy, reply, Job::Destroy);
            }
            Request::Memory(id, reply) => match self.find(&id).and_then(has_room) {
                Ok(entry) => send(entry, Job::Memory(reply)),
                Err(error) => drop(reply.send(Err(error))),
            },
            Request::Disk(id, reply) => match self.find(&id).and_then(has_room) {
                Ok(entry) => send(entry, Job::Disk(reply)),
                Err(error) => drop(reply.send(Err(error))),
            },
            Request::Network(id, policy, reply) => match self.find(&id).and_then(has_room) {
                Ok(entry) => send(entry, Job::Network(policy, reply)),
                Err(error) => drop(reply.send(Err(error))),
            },
            Request::Route(id, reply) => {
                let _ = reply.send(self.route(&id));
            }
            Request::Drain(reply) => self.drain(reply),
        }
    }

    fn create(&mut self, row: SandboxRow, template: Template, reply: Reply<Sandbox>) {
        let generation = None;
        let events = self.host.events.clone();
        let cell = Cell::new(row, generation, self.host.slots.pool(), events);
        cell.announce();
        let owner = Owner::new(self.host.clone(), cell.clone());
        self.adopt(cell, |jobs| owner.create(template, reply, jobs));
    }

    fn adopt<F>(&mut self, cell: Cell, task: impl FnOnce(mpsc::Receiver<Job>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (jobs, inbox) = mpsc::channel(JOBS_PER_SANDBOX);
        let id = cell.row().id;
        let (task, ended) = (task(inbox), id.clone());
        self.owners.spawn(async move {
            task.await;
            ended
        });
        self.entries.insert(id, Entry { cell, jobs });
    }

    fn find(&self, id: &SandboxId) -> Result<&Entry, ApiError> {
        match self.entries.get(id) {
            Some(entry) if !entry.cell.is_gone() => Ok(entry),
            _ => Err(ApiError::NotFound {
                what: "sandbox",
                name: id.to_string(),
            }),
        }
    }

    /// Judges an operation, enters its state and gives it to the owner.
    fn hand_on<T>(
        &self,
        id: &SandboxId,
        operation: Operation,
        reply: Reply<T>,
        job: impl FnOnce(Reply<T>) -> Job,
    ) {
        let judged = self.find(id).and_then(has_room).and_then(|entry| {
            entry.cell.begin(operation)?;
            Ok(entry)
        });
        match judged {
            Ok(entry) => send(entry, job(reply)),
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    fn route(&self, id: &SandboxId) -> Result<Route, ApiError> {
        let entry = self.find(id)?;
        begin(entry.cell.state(), Operation::Exec)?;
        Ok(Route {
            address: entry.cell.address(),
            access_token: entry.cell.row().access_token,
            state: entry.cell.watch(),
            connection: entry.cell.connections().open(),
        })
    }

    /// Every sandbox that runs, or soon will, is paused by its own task; a task of its own
    /// waits for them.
    fn drain(&self, reply: Reply<()>) {
        let mut pauses = JoinSet::new();
        let at_once = Arc::new(Semaphore::new(PAUSES_AT_ONCE));
        for entry in self.entries.values() {
            let (cell, jobs, at_once) = (entry.cell.clone(), entry.jobs.clone(), at_once.clone());
            pauses.spawn(async move {
                let _turn = at_once.acquire().await;
                if let Err(error) = pause_when_settled(&cell, &jobs).await {
                    tracing::error!(sandbox_id = %cell.row().id, %error, "It was not paused");
                }
            });
        }
        tokio::spawn(async move {
            while pauses.join_next().await.is_some() {}
            let _ = reply.send(Ok(()));
        });
    }
}

/// Waits until what is being done to a sandbox is done, and pauses it if it runs then.
async fn pause_when_settled(cell: &Cell, jobs: &mpsc::Sender<Job>) -> Result<(), ApiError> {
    use SandboxState as S;
    let mut state = cell.watch();
    let settled = |state: &S| matches!(state, S::Running | S::Paused | S::Failed | S::Destroying);
    if state.wait_for(settled).await.is_err() || cell.begin(Operation::Pause).is_err() {
        return Ok(());
    }
    let (reply, answer) = oneshot::channel();
    if jobs.send(Job::Pause(reply)).await.is_err() {
        return Ok(());
    }
    answer.await.map_or(Ok(()), |paused| paused.map(|_| ()))
}

fn has_room(entry: &Entry) -> Result<&Entry, ApiError> {
    if entry.jobs.capacity() == 0 {
        let detail = "The sandbox has too many requests waiting; try again".into();
        return Err(ApiError::Busy { detail });
    }
    Ok(entry)
}

/// The mailbox of a sandbox has room, or its owner has ended and the reply is dropped.
fn send(entry: &Entry, job: Job) {
    let _ = entry.jobs.try_send(job);
}
