//! The control plane behind the HTTP routes: finds the shard that owns a sandbox and
//! carries requests there. Holds no state of its own; one per shard, all alike.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http_api::ids::{SandboxId, TemplateName};
use http_api::wire::{
    CreateSandbox, CreateSnapshot, DiskStats, ExecRequest, ExecResult, HostInfo, MemoryStats,
    NetworkPolicy, Sandbox, SandboxState, Snapshot, SnapshotKind,
};
use http_api::{ApiError, ControlPlane, Readiness};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::catalogue::{CatalogueError, SandboxRow, builds, sandboxes, templates};
use crate::config::check_disk_size;
use crate::disks;
use crate::guest::{Guest, GuestError};
use crate::host::Host;
use crate::network::SlotIndex;
use crate::sandbox::Reply;
use crate::shard::{Request, Route};
use crate::template::{Origin, Template};

/// The way to all shards.
#[derive(Clone)]
pub struct Gateway {
    host: Arc<Host>,
    shards: Arc<Vec<mpsc::Sender<Request>>>,
    /// Ids whose creation has begun and which no shard has yet.
    starting: Arc<Mutex<BTreeSet<SandboxId>>>,
}

impl Gateway {
    /// A gateway to these shards.
    #[must_use]
    pub fn new(host: Arc<Host>, shards: Vec<mpsc::Sender<Request>>) -> Self {
        Self {
            host,
            shards: Arc::new(shards),
            starting: Arc::default(),
        }
    }

    /// Pauses everything; for the daemon's end.
    pub async fn drain(&self) {
        self.host.draining.store(true, Ordering::Release);
        let mut answers = Vec::new();
        for shard in self.shards.iter() {
            let (reply, answer) = oneshot::channel();
            if shard.send(Request::Drain(reply)).await.is_ok() {
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
        match shard.try_send(request(reply)) {
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

    /// Puts the new sandbox's row into the catalogue, with a free slot.
    async fn insert(&self, row: SandboxRow) -> Result<SandboxRow, ApiError> {
        let id = row.id.clone();
        let slots = self.host.slots.pool().slots();
        let insert = move |connection: &mut rusqlite::Connection| {
            if sandboxes::exists(connection, &row.id)? {
                return Ok(Err(row.id));
            }
            Ok(Ok(sandboxes::insert_with_free_slot(
                connection, row, slots,
            )?))
        };
        match self
            .host
            .catalogue
            .call(insert)
            .await
            .map_err(catalogue_failed)?
        {
            Err(_) => Err(ApiError::Exists {
                what: "sandbox",
                name: id.to_string(),
            }),
            Ok(None) => Err(ApiError::Full {
                detail: format!("All {slots} network slots are taken; delete a sandbox first"),
            }),
            Ok(Some(row)) => Ok(row),
        }
    }

    async fn describe(&self, template: Template) -> Result<Snapshot, ApiError> {
        let mut snapshot = Snapshot {
            name: template.name,
            kind: SnapshotKind::Disk,
            build: None,
            generation: None,
            vcpus: template.shape.vcpus,
            memory_mb: template.shape.memory_mb,
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

    async fn create_admitted(
        &self,
        id: SandboxId,
        request: CreateSandbox,
    ) -> Result<Sandbox, ApiError> {
        let mut template = self.template(&request.template)?;
        let shape = template.shape_for(&request)?;
        if let Some(size_mb) = request.disk_size_mb {
            self.size_disk(&mut template, size_mb)?;
        }
        let build = match template.origin {
            Origin::Disk { .. } => None,
            // In the row from the start, so that the build is needed from the start.
            Origin::Memory(build) => Some(build),
        };
        let row = SandboxRow {
            id,
            template: request.template,
            shape,
            slot: SlotIndex(0),
            state: SandboxState::Creating,
            build,
            reason: None,
            created_at_ms: crate::clock::now_ms(),
            env: request.env,
            labels: request.labels,
            network: request.network,
        };
        let row = self.insert(row).await?;
        let id = row.id.clone();
        let create = |reply| Request::Create(Box::new(row), Box::new(template), reply);
        let created = self.ask(&id, create).await;
        if created.is_err() {
            // An owner has removed it already; a request that never reached one has not.
            let remove =
                move |connection: &mut rusqlite::Connection| sandboxes::remove(connection, &id);
            self.host
                .catalogue
                .call(remove)
                .await
                .map_err(catalogue_failed)?;
        }
        created
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
        Ok(HostInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vmm: self.host.driver.info().clone(),
            disks: self.host.disks.reason().to_owned(),
            shards: self.shards.len(),
            engines: self.host.engines.count(),
            workers: self.host.waiting.clone(),
            sandboxes: self.list().await?.len(),
        })
    }

    async fn create(&self, request: CreateSandbox) -> Result<Sandbox, ApiError> {
        self.admit()?;
        let id = request
            .id
            .clone()
            .unwrap_or_else(crate::clock::new_sandbox_id);
        if !self.starting.lock().insert(id.clone()) {
            return Err(ApiError::Exists {
                what: "sandbox",
                name: id.to_string(),
            });
        }
        // Its own task: a client that goes away between the row and the shard would
        // leave a row that nobody owns.
        let (gateway, starting, owned) = (self.clone(), self.starting.clone(), id.clone());
        let created = tokio::spawn(async move {
            let result = gateway.create_admitted(owned.clone(), request).await;
            starting.lock().remove(&owned);
            result
        });
        created.await.unwrap_or_else(|_| {
            let detail = "The task that created the sandbox failed".into();
            Err(ApiError::Failed {
                code: "internal",
                detail,
            })
        })
    }

    async fn list(&self) -> Result<Vec<Sandbox>, ApiError> {
        let mut all = Vec::new();
        for shard in self.shards.iter() {
            let (reply, answer) = oneshot::channel();
            let stopped = || ApiError::Unavailable {
                detail: "The daemon is stopping".into(),
            };
            shard
                .send(Request::List(reply))
                .await
                .map_err(|_| stopped())?;
            all.extend(answer.await.map_err(|_| stopped())??);
        }
        all.sort_by(|a: &Sandbox, b: &Sandbox| a.id.cmp(&b.id));
        Ok(all)
    }

    async fn get(&self, id: SandboxId) -> Result<Sandbox, ApiError> {
        self.ask(&id, |reply| Request::Get(id.clone(), reply)).await
    }

    async fn pause(&self, id: SandboxId) -> Result<Sandbox, ApiError> {
        self.ask(&id, |reply| Request::Pause(id.clone(), reply))
            .await
    }

    async fn resume(&self, id: SandboxId) -> Result<Sandbox, ApiError> {
        self.admit()?;
        self.ask(&id, |reply| Request::Resume(id.clone(), reply))
            .await
    }

    async fn exec(&self, id: SandboxId, request: ExecRequest) -> Result<ExecResult, ApiError> {
        let route = self
            .ask(&id, |reply| Request::Route(id.clone(), reply))
            .await?;
        let Route {
            address,
            mut state,
            mut connection,
        } = route;
        let guest = Guest::at(address);
        // A pause says when: what ends soon has time to.
        let stays = |state: &SandboxState| {
            use SandboxState::{Pausing, Running, Snapshotting};
            matches!(state, Running | Snapshotting | Pausing)
        };
        let now = state.clone();
        let leaves = async {
            tokio::select! {
                left = state.wait_for(|state| !stays(state)) => {
                    left.map_or(SandboxState::Destroying, |state| *state)
                }
                () = connection.closed() => *now.borrow(),
            }
        };
        tokio::select! {
            result = guest.exec(&request) => result.map_err(|error| exec_failed(&error)),
            state = leaves => {
                let detail = match state {
                    SandboxState::Pausing | SandboxState::Paused => {
                        "The sandbox was paused; the command goes on when it is resumed, but the \
                         rest of its output is lost"
                            .to_owned()
                    }
                    state => format!("The sandbox is {state} now, and the command went with it"),
                };
                Err(ApiError::Denied { state, detail })
            }
        }
    }

    async fn memory(&self, id: SandboxId) -> Result<MemoryStats, ApiError> {
        self.ask(&id, |reply| Request::Memory(id.clone(), reply))
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

    async fn delete(&self, id: SandboxId) -> Result<(), ApiError> {
        self.ask(&id, |reply| Request::Destroy(id.clone(), reply))
            .await
    }

    async fn create_snapshot(&self, request: CreateSnapshot) -> Result<Snapshot, ApiError> {
        let CreateSnapshot { sandbox, name } = request;
        if self.host.templates.read().contains_key(&name) {
            return Err(ApiError::Exists {
                what: "template",
                name: name.to_string(),
            });
        }
        self.ask(&sandbox, |reply| {
            Request::Snapshot(sandbox.clone(), name, reply)
        })
        .await
    }

    async fn list_snapshots(&self) -> Result<Vec<Snapshot>, ApiError> {
        let templates: Vec<Template> = self.host.templates.read().values().cloned().collect();
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
        let removed = name.clone();
        let remove =
            move |connection: &mut rusqlite::Connection| templates::remove(connection, &removed);
        self.host
            .catalogue
            .call(remove)
            .await
            .map_err(catalogue_failed)?;
        self.host.templates.write().remove(&name);
        self.host.collect_garbage().await.map_err(catalogue_failed)
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
