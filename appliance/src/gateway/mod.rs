//! The control plane behind the HTTP routes: finds the shard that owns a sandbox and
//! carries requests there. Holds no state of its own; one per shard, all alike.

mod about;
mod inside;
mod leftovers;
mod making;
mod refusal;
mod templates;
mod traffic;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http_api::auth::{Scope, TokenHash};
use http_api::ids::{SandboxId, TemplateName};
use http_api::wire::{
    ConsoleLine, CreateSandbox, CreateSnapshot, Created, DiskLimits, DiskStats, Drained,
    ExecRequest, ExecResult, ForkSandbox, GuestMetrics, HostInfo, Left, MemoryStats, NetworkPolicy,
    Reconciled, ResumeSandbox, Sandbox, SandboxState, SetTimeout, Snapshot,
};
use http_api::{Aim, ApiError, ControlPlane, EventStream, Readiness, context};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::guest::Guest;
use crate::host::Host;
use crate::metrics::Timed;
use crate::sandbox::{NewTemplate, Reply};
use crate::shard::{Asked, Request};
use making::Starting;
use refusal::{catalogue_failed, exec_failed, left_in, task_failed};

/// How long engines may take to say what they did.
const STATS_TIME: Duration = Duration::from_secs(1);
/// How long a guest may take to say how busy it is.
const METRICS_TIME: Duration = Duration::from_secs(10);

/// The way to all shards.
#[derive(Clone)]
pub struct Gateway {
    host: Arc<Host>,
    shards: Arc<Vec<mpsc::Sender<Asked>>>,
    starting: Starting,
}

impl Gateway {
    /// A gateway to these shards.
    #[must_use]
    pub fn new(host: Arc<Host>, shards: Vec<mpsc::Sender<Asked>>) -> Self {
        Self {
            host,
            shards: Arc::new(shards),
            starting: Arc::default(),
        }
    }

    /// Takes no new work and pauses everything; for the daemon's end, and for who drains a host.
    pub async fn pause_all(&self) {
        self.host.draining.store(true, Ordering::Release);
        let mut answers = Vec::new();
        for shard in self.shards.iter() {
            let (reply, answer) = oneshot::channel();
            if shard.send(Request::Drain(reply).into()).await.is_ok() {
                answers.push(answer);
            }
        }
        for answer in answers {
            let _ = answer.await;
        }
    }

    /// Which shard owns a sandbox.
    #[must_use]
    pub fn owner_of(id: &SandboxId, shards: usize) -> usize {
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        (hasher.finish() % shards as u64) as usize
    }

    async fn ask<T>(
        &self,
        id: &SandboxId,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, ApiError> {
        let shard = &self.shards[Self::owner_of(id, self.shards.len())];
        let (reply, answer) = oneshot::channel();
        let stopped = || ApiError::Unavailable {
            detail: "The daemon is stopping".into(),
        };
        match shard.try_send(request(reply).into()) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                let detail = "The host has too many requests waiting; try again".into();
                return Err(ApiError::Busy { detail });
            }
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(stopped()),
        }
        answer.await.map_err(|_| stopped())?
    }

    fn admit(&self) -> Result<(), ApiError> {
        if self.host.draining.load(Ordering::Acquire) {
            let detail = "The host is draining and takes no new work".into();
            return Err(ApiError::Unavailable { detail });
        }
        Ok(())
    }

    async fn watch(&self, id: &SandboxId) -> Result<watch::Receiver<SandboxState>, ApiError> {
        self.ask(id, |reply| Request::Watch(id.clone(), reply))
            .await
    }
}

impl ControlPlane for Gateway {
    async fn readiness(&self) -> Readiness {
        match self.admit() {
            Ok(()) => Readiness::Ready,
            Err(error) => Readiness::NotReady(error.to_string()),
        }
    }

    async fn host(&self) -> Result<HostInfo, ApiError> {
        self.about_host().await
    }

    async fn prometheus(&self) -> Result<String, ApiError> {
        let (present, said) = self.host.engines.sessions(STATS_TIME).await;
        self.host.metrics.faults.look(&present, said);
        let depth = self.host.slots.depth();
        let text = self
            .host
            .metrics
            .text(&self.host().await?, depth, self.host.ready.depth());
        text.map_err(|error| ApiError::failed("internal", &error))
    }

    async fn drain(&self) -> Result<Drained, ApiError> {
        let running = self.list().await?.into_iter();
        let was_paused = |sandbox: &Sandbox| sandbox.state == SandboxState::Paused;
        let before: Vec<SandboxId> = running.filter(was_paused).map(|s| s.id).collect();
        // In a task of its own: it goes on when the client goes away.
        let gateway = self.clone();
        let paused = async move { gateway.pause_all().await };
        let paused = tokio::spawn(context::within(context::current(), paused));
        paused.await.map_err(|_| task_failed())?;
        let mut drained = Drained::default();
        for sandbox in self.list().await? {
            match sandbox.state {
                SandboxState::Paused if before.contains(&sandbox.id) => {}
                SandboxState::Paused => drained.paused.push(sandbox.id),
                state => drained.left.push(Left {
                    id: sandbox.id,
                    state,
                    reason: sandbox.reason,
                }),
            }
        }
        Ok(drained)
    }

    async fn reconcile(&self) -> Result<Reconciled, ApiError> {
        // In a task of its own: what was begun is ended when the client goes away.
        let gateway = self.clone();
        let work = async move { gateway.reconcile_now().await };
        let done = tokio::spawn(context::within(context::current(), work)).await;
        done.unwrap_or_else(|_| Err(task_failed()))
    }

    async fn undrain(&self) -> Result<(), ApiError> {
        self.host.draining.store(false, Ordering::Release);
        Ok(())
    }

    async fn events(&self, after: Option<u64>) -> Result<EventStream, ApiError> {
        Ok(self.host.events.stream(self.host.catalogue.clone(), after))
    }

    async fn scope(&self, token: TokenHash) -> Result<Option<Scope>, ApiError> {
        let scope = self.host.tokens.scope(&self.host.catalogue, token);
        scope.await.map_err(catalogue_failed)
    }

    async fn create(&self, request: CreateSandbox) -> Result<Created, ApiError> {
        let create = self.create_once(request);
        self.host.metrics.time(Timed::Create, create).await
    }

    async fn list(&self) -> Result<Vec<Sandbox>, ApiError> {
        let mut all = Vec::new();
        for shard in self.shards.iter() {
            let (reply, answer) = oneshot::channel();
            let stopped = || ApiError::Unavailable {
                detail: "The daemon is stopping".into(),
            };
            shard
                .send(Request::List(reply).into())
                .await
                .map_err(|_| stopped())?;
            all.extend(answer.await.map_err(|_| stopped())??);
        }
        all.sort_by(|a: &Sandbox, b: &Sandbox| a.id.cmp(&b.id));
        for sandbox in &mut all {
            sandbox.access_token = None;
        }
        Ok(all)
    }

    async fn get(&self, id: SandboxId) -> Result<Sandbox, ApiError> {
        self.ask(&id, |reply| Request::Get(id.clone(), reply)).await
    }

    async fn pause(&self, aim: Aim) -> Result<Sandbox, ApiError> {
        let id = aim.id.clone();
        let pause = self.ask(&id, |reply| Request::Pause(aim, reply));
        self.host.metrics.time(Timed::Pause, pause).await
    }

    async fn resume(&self, aim: Aim, request: ResumeSandbox) -> Result<Sandbox, ApiError> {
        self.admit()?;
        let id = aim.id.clone();
        let resume = self.ask(&id, |reply| Request::Resume(aim, request, reply));
        self.host.metrics.time(Timed::Resume, resume).await
    }

    async fn wait(
        &self,
        id: SandboxId,
        states: Vec<SandboxState>,
        patience: Duration,
    ) -> Result<Sandbox, ApiError> {
        let mut watch = self.watch(&id).await?;
        // Gone, there, or out of time: what it is now tells which.
        let _ = timeout(patience, watch.wait_for(|state| states.contains(state))).await;
        self.get(id).await
    }

    async fn set_timeout(&self, aim: Aim, request: SetTimeout) -> Result<Sandbox, ApiError> {
        let id = aim.id.clone();
        self.ask(&id, |reply| Request::Timeout(aim, request, reply))
            .await
    }

    async fn fork(
        &self,
        aim: Aim,
        request: ForkSandbox,
    ) -> Result<Vec<Result<Sandbox, ApiError>>, ApiError> {
        self.admit()?;
        // In a task of its own: the template goes even when the client does.
        let gateway = self.clone();
        let forks = async move {
            let fork = gateway.fork_now(aim, request);
            gateway.host.metrics.time(Timed::Fork, fork).await
        };
        let forks = tokio::spawn(context::within(context::current(), forks));
        forks.await.unwrap_or_else(|_| Err(task_failed()))
    }

    async fn metrics(&self, id: SandboxId) -> Result<GuestMetrics, ApiError> {
        let route = self.ask(&id, |reply| Request::Route(id.clone(), reply));
        let route = route.await?;
        let guest = Guest::at(route.address).with_token(route.access_token);
        let metrics = guest.metrics(METRICS_TIME).await;
        metrics.map_err(|error| ApiError::failed("guest_failed", &error))
    }

    async fn exec(&self, id: SandboxId, request: ExecRequest) -> Result<ExecResult, ApiError> {
        let mut route = self
            .ask(&id, |reply| Request::Route(id.clone(), reply))
            .await?;
        let guest = Guest::at(route.address).with_token(route.access_token.take());
        tokio::select! {
            result = guest.exec(&request) => result.map_err(|error| exec_failed(&error)),
            state = route.left() => Err(ApiError::Denied {
                state,
                detail: left_in(state),
            }),
        }
    }

    async fn memory(&self, id: SandboxId) -> Result<MemoryStats, ApiError> {
        self.ask(&id, |reply| Request::Memory(id.clone(), reply))
            .await
    }

    async fn console(&self, id: SandboxId) -> Result<Vec<ConsoleLine>, ApiError> {
        self.ask(&id, |reply| Request::Console(id.clone(), reply))
            .await
    }

    async fn disk(&self, id: SandboxId) -> Result<DiskStats, ApiError> {
        self.ask(&id, |reply| Request::Disk(id.clone(), reply))
            .await
    }

    async fn set_network(&self, id: SandboxId, policy: NetworkPolicy) -> Result<Sandbox, ApiError> {
        self.ask(&id, |reply| Request::Network(id.clone(), policy, reply))
            .await
    }

    async fn limit_disk(&self, id: SandboxId, limits: DiskLimits) -> Result<Sandbox, ApiError> {
        self.ask(&id, |reply| Request::LimitDisk(id.clone(), limits, reply))
            .await
    }

    async fn delete(&self, aim: Aim) -> Result<(), ApiError> {
        let id = aim.id.clone();
        let mut watch = self.watch(&id).await?;
        let destroy = self.ask(&id, |reply| Request::Destroy(aim, reply));
        match self.host.metrics.time(Timed::Delete, destroy).await {
            // Somebody else does; done is when nobody can change it any more.
            Err(ApiError::Denied {
                state: SandboxState::Destroying,
                ..
            }) => {
                while watch.changed().await.is_ok() {}
                Ok(())
            }
            destroyed => destroyed,
        }
    }

    async fn create_snapshot(&self, request: CreateSnapshot) -> Result<Snapshot, ApiError> {
        let CreateSnapshot {
            sandbox,
            name,
            execution_id,
        } = request;
        let name = name.unwrap_or_else(|| crate::clock::new_template_name("snap"));
        if self.host.templates.read().contains_key(&name) {
            return Err(ApiError::Exists {
                what: "template",
                name: name.to_string(),
            });
        }
        let template = NewTemplate {
            name,
            transient: false,
        };
        let aim = Aim {
            id: sandbox.clone(),
            execution_id,
        };
        let snapshot = self.ask(&sandbox, |reply| Request::Snapshot(aim, template, reply));
        self.host.metrics.time(Timed::Snapshot, snapshot).await
    }

    async fn list_snapshots(&self) -> Result<Vec<Snapshot>, ApiError> {
        self.describe_templates().await
    }

    async fn get_snapshot(&self, name: TemplateName) -> Result<Snapshot, ApiError> {
        let template = self.template(&name)?;
        self.describe(template).await
    }

    async fn delete_snapshot(&self, name: TemplateName) -> Result<(), ApiError> {
        self.delete_template(&name).await
    }
}
