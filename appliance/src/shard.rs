//! One core's thread of the daemon: its runtime, its listener, and the sandboxes it owns.
//!
//! A sandbox belongs to the shard that its id hashes to, for ever. Requests arrive at any
//! shard and reach the owner through its bounded mailbox; here they are judged, and handed
//! to the sandbox's own task. Nothing in this loop waits.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use http_api::context::{self, Context};
use http_api::ids::SandboxId;
use http_api::wire::{
    ConsoleLine, DiskLimits, DiskStats, MemoryStats, NetworkPolicy, ResumeSandbox, Sandbox,
    SandboxState, SetTimeout, Snapshot,
};
use http_api::{Aim, ApiError};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::catalogue::SandboxRow;
use crate::host::Host;
use crate::sandbox::adoption::Left;
use crate::sandbox::state::{Operation, begin};
use crate::sandbox::{Cell, Connection, Given, Job, NewTemplate, Owner, Reply};
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
    Pause(Aim, Reply<Sandbox>),
    /// Back.
    Resume(Aim, ResumeSandbox, Reply<Sandbox>),
    /// Longer or shorter.
    Timeout(Aim, SetTimeout, Reply<Sandbox>),
    /// A template of it.
    Snapshot(Aim, NewTemplate, Reply<Snapshot>),
    /// What its memory did.
    Memory(SandboxId, Reply<MemoryStats>),
    /// What its VMM and its guest printed.
    Console(SandboxId, Reply<Vec<ConsoleLine>>),
    /// What its disk takes.
    Disk(SandboxId, Reply<DiskStats>),
    /// Let it reach other networks.
    Network(SandboxId, NetworkPolicy, Reply<Sandbox>),
    /// Change how much it may do with its disk.
    LimitDisk(SandboxId, DiskLimits, Reply<Sandbox>),
    /// The way to its guest.
    Route(SandboxId, Reply<Route>),
    /// Away with it.
    Destroy(Aim, Reply<()>),
    /// Pause all that run and take no more; answered when no VMM is left.
    Drain(Reply<()>),
}

/// What a shard is asked, and for which of the API's requests.
pub struct Asked {
    request: Request,
    context: Option<Context>,
}

impl From<Request> for Asked {
    /// For the one that this task works for.
    fn from(request: Request) -> Self {
        let context = context::current();
        Self { request, context }
    }
}

struct Entry {
    cell: Cell,
    jobs: mpsc::Sender<Given>,
}

/// The shard's state.
pub struct Shard {
    host: Arc<Host>,
    entries: BTreeMap<SandboxId, Entry>,
    owners: JoinSet<SandboxId>,
}

impl Shard {
    /// A shard that owns these sandboxes, and takes over the guests that some of them have. To be
    /// called on the runtime that it runs on.
    #[must_use]
    pub fn new(host: Arc<Host>, sandboxes: Vec<(Cell, Option<Left>)>) -> Self {
        let mut shard = Self {
            host,
            entries: BTreeMap::new(),
            owners: JoinSet::new(),
        };
        for (cell, left) in sandboxes {
            let owner = Owner::new(shard.host.clone(), cell.clone());
            match left {
                Some(left) => shard.adopt(cell, |jobs| owner.take_over(left, jobs)),
                None => shard.adopt(cell, |jobs| owner.serve(jobs)),
            }
        }
        shard
    }

    /// Serves requests until the mailbox closes, then waits for the owners.
    pub async fn run(mut self, mut mailbox: mpsc::Receiver<Asked>) {
        loop {
            tokio::select! {
                request = mailbox.recv() => match request {
                    Some(asked) => self.answer(asked),
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

    fn answer(&mut self, asked: Asked) {
        let Asked { request, context } = asked;
        match request {
            Request::Create(row, template, reply) => self.create(*row, *template, reply, context),
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
            Request::Pause(aim, reply) => {
                self.hand_on(&aim, Operation::Pause, context, reply, Job::Pause);
            }
            Request::Resume(aim, request, reply) => {
                self.hand_on(&aim, Operation::Resume, context, reply, |reply| {
                    Job::Resume(request, reply)
                });
            }
            Request::Timeout(aim, request, reply) => {
                self.pass_on(&aim, context, reply, |reply| Job::Timeout(request, reply));
            }
            Request::Snapshot(aim, name, reply) => {
                self.hand_on(&aim, Operation::Snapshot, context, reply, |reply| {
                    Job::Snapshot(name, reply)
                });
            }
            Request::Destroy(aim, reply) => {
                self.hand_on(&aim, Operation::Destroy, context, reply, Job::Destroy);
            }
            Request::Memory(id, reply) => self.pass_on(&id.into(), context, reply, Job::Memory),
            Request::Console(id, reply) => self.pass_on(&id.into(), context, reply, Job::Console),
            Request::Disk(id, reply) => self.pass_on(&id.into(), context, reply, Job::Disk),
            Request::Network(id, policy, reply) => {
                self.pass_on(&id.into(), context, reply, |reply| {
                    Job::Network(policy, reply)
                });
            }
            Request::LimitDisk(id, limits, reply) => {
                self.pass_on(&id.into(), context, reply, |reply| {
                    Job::LimitDisk(limits, reply)
                });
            }
            Request::Route(id, reply) => {
                let _ = reply.send(self.route(&id));
            }
            Request::Drain(reply) => self.drain(reply),
        }
    }

    fn create(
        &mut self,
        row: SandboxRow,
        template: Template,
        reply: Reply<Sandbox>,
        context: Option<Context>,
    ) {
        let generation = None;
        let events = self.host.events.clone();
        let cell = Cell::new(row, generation, self.host.slots.pool(), events);
        cell.announce();
        let owner = Owner::new(self.host.clone(), cell.clone());
        self.adopt(cell, |jobs| owner.create(template, reply, context, jobs));
    }

    fn adopt<F>(&mut self, cell: Cell, task: impl FnOnce(mpsc::Receiver<Given>) -> F)
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

    /// The one that is meant, in the run that is meant.
    fn aimed(&self, aim: &Aim) -> Result<&Entry, ApiError> {
        let entry = self.find(&aim.id)?;
        if aim.execution_id.is_some() {
            aim.check(entry.cell.row().execution_id.as_deref())?;
        }
        Ok(entry)
    }

    /// Judges an operation, enters its state and gives it to the owner.
    fn hand_on<T>(
        &self,
        aim: &Aim,
        operation: Operation,
        context: Option<Context>,
        reply: Reply<T>,
        job: impl FnOnce(Reply<T>) -> Job,
    ) {
        let judged = self.aimed(aim).and_then(has_room).and_then(|entry| {
            entry.cell.begin(operation)?;
            Ok(entry)
        });
        give(judged, context, reply, job);
    }

    /// Gives to the owner what changes no state.
    fn pass_on<T>(
        &self,
        aim: &Aim,
        context: Option<Context>,
        reply: Reply<T>,
        job: impl FnOnce(Reply<T>) -> Job,
    ) {
        let judged = self.aimed(aim).and_then(has_room);
        give(judged, context, reply, job);
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
async fn pause_when_settled(cell: &Cell, jobs: &mpsc::Sender<Given>) -> Result<(), ApiError> {
    use SandboxState as S;
    let mut state = cell.watch();
    let settled = |state: &S| matches!(state, S::Running | S::Paused | S::Failed | S::Destroying);
    if state.wait_for(settled).await.is_err() || cell.begin(Operation::Pause).is_err() {
        return Ok(());
    }
    let (reply, answer) = oneshot::channel();
    if jobs.send(Job::Pause(reply).within(None)).await.is_err() {
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

/// The mailbox of a sandbox that was found has room, or its owner has ended and the reply is dropped.
fn give<T>(
    judged: Result<&Entry, ApiError>,
    context: Option<Context>,
    reply: Reply<T>,
    job: impl FnOnce(Reply<T>) -> Job,
) {
    match judged {
        Ok(entry) => drop(entry.jobs.try_send(job(reply).within(context))),
        Err(error) => drop(reply.send(Err(error))),
    }
}
