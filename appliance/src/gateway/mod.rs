//! The control plane behind the HTTP routes: finds the shard that owns a sandbox and
//! carries requests there. Holds no state of its own; one per shard, all alike.

mod inside;
mod leftovers;
mod making;
mod traffic;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http_api::auth::{Scope, TokenHash};
use http_api::ids::{SandboxId, TemplateName};
use http_api::wire::{
    ConsoleLine, CreateSandbox, CreateSnapshot, Created, DiskLimits, DiskStats, Drained,
    ExecRequest, ExecResult, ForkSandbox, GuestMetrics, HostInfo, HostStatus, Left, MemoryStats,
    NetworkPolicy, Reconciled, ResumeSandbox, Sandbox, SandboxState, SetTimeout, Snapshot,
    SnapshotKind,
};
use http_api::{Aim, ApiError, ControlPlane, EventStream, Readiness, context};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::catalogue::{CatalogueError, builds, templates};
use crate::config::check_disk_size;
use crate::disks;
use crate::guest::{Guest, GuestError};
use crate::host::Host;
use crate::inventory;
use crate::metrics::Timed;
use crate::sandbox::{NewTemplate, Reply};
use crate::shard::{Asked, Request};
use crate::template::{Origin, Template};

/// How long engines may take to say what they did.
const STATS_TIME: Duration = Duration::from_secs(1);
/// How long a guest may take to say how busy it is.
const METRICS_TIME: Duration = Duration::from_secs(10);

use making::Starting;

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

    fn template(&self, name: &TemplateName) -> Result<Template, ApiError> {
        let template = self.host.templates.read().get(name).cloned();
        template.ok_or_else(|| ApiError::NotFound {
            what: "template",
            name: name.to_string(),
        })
    }

    async fn describe(&self, template: Template) -> Result<Snapshot, ApiError> {
        let mut snapshot = Snapshot {
            name: template.name,
            kind: SnapshotKind::Disk,
            build: None,
            generation: None,
            vcpus: template.shape.vcpus,
            memory_mb: template.shape.memory_mb,
            huge_pages: template.shape.huge_pages,
            disk_mb: template.disk_mb,
            sandbox: template.sandbox,
            diff_pages: None,
            created_at_ms: template.created_at_ms,
        };
        if let Origin::Memory(id) = template.origin {
            snapshot.kind = SnapshotKind::Memory;
            snapshot.build = Some(id.to_string());
            let lookup = move |connection: &mut rusqlite::Connection| builds::get(connection, id);
            let row = self
                .host
                .catalogue
                .call(lookup)
                .await
                .map_err(catalogue_failed)?;
            snapshot.generation = row.as_ref().map(|row| row.generation.get());
            snapshot.diff_pages = row.map(|row| row.stored_pages);
        }
        Ok(snapshot)
    }

    /// Gives a new sandbox's disk the size that was asked for.
    fn size_disk(&self, template: &mut Template, asked_mb: u64) -> Result<(), ApiError> {
        let refused = |detail| ApiError::BadRequest {
            field: "disk_size_mb".into(),
            detail,
        };
        match &mut template.origin {
            Origin::Disk { image, size_mb } => {
                let has = std::fs::metadata(&*image).map_or(0, |image| image.len());
                check_disk_size(asked_mb, has).map_err(refused)?;
                *size_mb = Some(asked_mb);
                Ok(())
            }
            Origin::Memory(build) => {
                let usage = disks::usage_of(&self.host.store.path(build));
                let usage = usage.map_err(|error| ApiError::failed("disk_failed", &error))?;
                if usage.size_bytes == asked_mb << 20 {
                    return Ok(());
                }
                let has = usage.size_bytes >> 20;
                Err(refused(format!(
                    "is {asked_mb}, but template {:?} has memory that knows its disk of {has} MiB; \
                     leave it out or ask for {has}",
                    template.name.as_str()
                )))
            }
        }
    }

    async fn forget_template(&self, name: &TemplateName) -> Result<(), ApiError> {
        let removed = name.clone();
        let remove =
            move |connection: &mut rusqlite::Connection| templates::remove(connection, &removed);
        self.host
            .catalogue
            .call(remove)
            .await
            .map_err(catalogue_failed)?;
        self.host.templates.write().remove(name);
        let collected = self.host.collect_garbage().await;
        collected.map(|_| ()).map_err(catalogue_failed)
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
        let all = self.list().await?;
        let mut states = BTreeMap::new();
        let mut capacity = inventory::room(&self.host.data_dir);
        capacity.slots_total = u64::from(self.host.slots.pool().slots());
        capacity.slots_used = all.len() as u64;
        for sandbox in &all {
            *states.entry(sandbox.state.to_string()).or_default() += 1;
            if !matches!(sandbox.state, SandboxState::Paused | SandboxState::Failed) {
                capacity.vcpus_allocated += u64::from(sandbox.vcpus);
                capacity.memory_allocated_mb += u64::from(sandbox.memory_mb);
            }
        }
        let draining = self.host.draining.load(Ordering::Acquire);
        let seen = |template: &&Template| !template.transient;
        Ok(HostInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            status: if draining {
                HostStatus::Draining
            } else {
                HostStatus::Ready
            },
            kernel: inventory::kernel(),
            vmm: self.host.drivers.chosen().info().clone(),
            disks: self.host.disks.reason().to_owned(),
            shards: self.shards.len(),
            engines: self.host.engines.count(),
            workers: self.host.waiting.clone(),
            sandboxes: all.len(),
            states,
            templates: self.host.templates.read().values().filter(seen).count(),
            cpu: inventory::cpu(),
            nodes: inventory::nodes(),
            hugepages: inventory::hugepages(),
            capacity,
        })
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
        let seen = |template: &&Template| !template.transient;
        let templates: Vec<Template> = {
            let all = self.host.templates.read();
            all.values().filter(seen).cloned().collect()
        };
        let mut snapshots = Vec::with_capacity(templates.len());
        for template in templates {
            snapshots.push(self.describe(template).await?);
        }
        Ok(snapshots)
    }

    async fn get_snapshot(&self, name: TemplateName) -> Result<Snapshot, ApiError> {
        let template = self.template(&name)?;
        self.describe(template).await
    }

    async fn delete_snapshot(&self, name: TemplateName) -> Result<(), ApiError> {
        let template = self.template(&name)?;
        if matches!(template.origin, Origin::Disk { .. }) {
            let detail = format!("{name} is a template of the configuration file; remove it there");
            return Err(ApiError::BadRequest {
                field: "name".into(),
                detail,
            });
        }
        self.forget_template(&name).await
    }
}

/// What is told to whoever listens to a command of a sandbox that no longer runs.
fn left_in(state: SandboxState) -> String {
    match state {
        SandboxState::Pausing | SandboxState::Paused => {
            "The sandbox was paused; the command goes on when it is resumed, but the rest of its \
             output is lost"
                .to_owned()
        }
        state => format!("The sandbox is {state} now, and the command went with it"),
    }
}

fn task_failed() -> ApiError {
    ApiError::Failed {
        code: "internal",
        detail: "The task that did it failed".into(),
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the shape that `map_err` wants"
)]
fn catalogue_failed(error: CatalogueError) -> ApiError {
    ApiError::failed("catalogue_failed", &error)
}

fn exec_failed(error: &GuestError) -> ApiError {
    match error {
        // The guest's daemon has judged the request.
        GuestError::Refused { body, .. } => ApiError::BadRequest {
            field: "cmd".into(),
            detail: body.clone(),
        },
        GuestError::TooMuchOutput => ApiError::BadRequest {
            field: "cmd".into(),
            detail: error.to_string(),
        },
        GuestError::Silent { .. } | GuestError::Broken { .. } => {
            ApiError::failed("guest_failed", error)
        }
    }
}
