//! The task that owns one sandbox: takes jobs one after the other, and notices when the
//! VMM ends between them.
//!
//! A job's state was entered (and judged) before it got here. Whatever happens to it, the
//! job ends in a settled state and with an answer, even when nobody waits for it any more.

use std::sync::Arc;

use http_api::ApiError;
use http_api::context::{Context, within};
use http_api::wire::{
    ConsoleLine, DiskLimits, DiskStats, MemoryStats, NetworkPolicy, ResumeSandbox, Sandbox,
    SandboxState, SetTimeout, Snapshot,
};
use tokio::sync::{mpsc, oneshot};

use super::adoption::{Left, Record, adopt};
use super::cell::Cell;
use super::expiry::time_is_up;
use super::live::{Live, give_back};
use super::snapshot::{Purpose, Taken, take};
use super::state::{Denied, Operation};
use super::templating::NewTemplate;
use super::{OperationError, boot, restore};
use crate::catalogue::{CatalogueError, SandboxRow, builds, sandboxes};
use crate::disks::{self, Source, Usage};
use crate::guest::Guest;
use crate::host::Host;
use crate::template::{Origin, Template};

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// One thing to do to a sandbox.
#[derive(Debug)]
pub enum Job {
    /// Write it to disk and end its VMM.
    Pause(Reply<Sandbox>),
    /// Bring it back.
    Resume(ResumeSandbox, Reply<Sandbox>),
    /// Let it run longer, or shorter.
    Timeout(SetTimeout, Reply<Sandbox>),
    /// Make a template of it.
    Snapshot(NewTemplate, Reply<Snapshot>),
    /// Say what its memory did.
    Memory(Reply<MemoryStats>),
    /// Say what its VMM and its guest printed.
    Console(Reply<Vec<ConsoleLine>>),
    /// Say what its disk takes.
    Disk(Reply<DiskStats>),
    /// Replace what it may reach.
    Network(NetworkPolicy, Reply<Sandbox>),
    /// Change how much it may do with its disk.
    LimitDisk(DiskLimits, Reply<Sandbox>),
    /// Remove it.
    Destroy(Reply<()>),
}

/// A job, and which of the API's requests it is done for.
#[derive(Debug)]
pub struct Given {
    job: Job,
    context: Option<Context>,
}

impl Job {
    /// To be done for a request, or for none.
    #[must_use]
    pub const fn within(self, context: Option<Context>) -> Given {
        Given { job: self, context }
    }
}

/// The task's state.
pub struct Owner {
    pub(super) host: Arc<Host>,
    pub(super) cell: Cell,
    pub(super) live: Option<Live>,
}

impl Owner {
    /// The owner of a sandbox that has no VMM now.
    #[must_use]
    pub fn new(host: Arc<Host>, cell: Cell) -> Self {
        Self {
            host,
            cell,
            live: None,
        }
    }

    /// Creates the sandbox from its template, then serves it.
    pub async fn create(
        mut self,
        template: Template,
        reply: Reply<Sandbox>,
        context: Option<Context>,
        jobs: mpsc::Receiver<Given>,
    ) {
        let row = self.cell.row();
        let making = async {
            match template.origin {
                Origin::Disk { image, size_mb } => {
                    let disk = Source::Image {
                        path: image,
                        size_mb,
                    };
                    boot::boot(&self.host, &row, disk).await
                }
                Origin::Memory(build) => restore::restore(&self.host, &row, build).await,
            }
        };
        let made = within(context, making).await;
        match self.keep(&row, made).await {
            Ok(()) => {
                self.cell.set_generation(self.generation().await);
                self.cell.settle(SandboxState::Running, None);
                let _ = reply.send(Ok(self.cell.view()));
                self.serve(jobs).await;
            }
            Err(error) => {
                let error = error.into_api("The sandbox was not created");
                self.forget(&error.to_string()).await;
                let _ = reply.send(Err(error));
                refuse_all(jobs, &row.id);
            }
        }
    }

    /// Takes over the sandbox's guest, which has outlived an earlier daemon, then serves it.
    pub async fn take_over(mut self, left: Left, jobs: mpsc::Receiver<Given>) {
        let (row, pid) = (self.cell.row(), left.survivor.pid);
        match adopt(&self.host, &row, left).await {
            Ok(live) => {
                tracing::warn!(sandbox_id = %row.id, pid, "Took over what outlived its daemon");
                self.live = Some(live);
                self.settle(SandboxState::Running, None).await;
            }
            Err(error) => {
                let error = uffd_engine::chain(&error);
                let reason = format!("The daemon ended while it was running: {error}");
                self.vmm_ended(reason).await;
            }
        }
        self.serve(jobs).await;
    }

    /// Keeps a guest that was made, once it is stored that it runs: after a crash, a row
    /// that says less would bring back what was before it ran.
    async fn keep(
        &mut self,
        row: &SandboxRow,
        made: Result<Live, OperationError>,
    ) -> Result<(), OperationError> {
        let live = made?;
        let recorded = Record::of(&live).write(&self.host.sandbox_run(&row.id));
        if let Err(error) = recorded {
            tracing::warn!(sandbox_id = %row.id, %error, "It would not outlive this daemon");
        }
        let execution_id = crate::clock::new_execution_id();
        self.cell.update(|row| {
            row.execution_id = Some(execution_id);
            row.started_at_ms = crate::clock::now_ms();
            row.inherited_token = None;
        });
        if let Err(error) = self.store(SandboxState::Running, None).await {
            give_back(&self.host, row, Some(live)).await;
            return Err(error.into());
        }
        self.live = Some(live);
        Ok(())
    }

    /// Takes jobs until the sandbox is gone.
    pub async fn serve(mut self, mut jobs: mpsc::Receiver<Given>) {
        loop {
            let job = match &mut self.live {
                Some(live) => tokio::select! {
                    biased;
                    job = jobs.recv() => job,
                    reason = live.end() => {
                        self.vmm_ended(reason).await;
                        continue;
                    }
                    () = time_is_up(&self.cell) => {
                        if self.expire().await {
                            return refuse_all(jobs, &self.cell.row().id);
                        }
                        continue;
                    }
                },
                None => jobs.recv().await,
            };
            let Some(Given { job, context }) = job else {
                return self.leave().await;
            };
            match job {
                Job::Pause(reply) => {
                    let result = within(context, self.pause()).await;
                    let _ = reply.send(result);
                }
                Job::Resume(request, reply) => {
                    let result = within(context, self.resume(request)).await;
                    let _ = reply.send(result);
                }
                Job::Timeout(request, reply) => {
                    let result = within(context, self.set_timeout(request)).await;
                    let _ = reply.send(result);
                }
                Job::Snapshot(name, reply) => {
                    let result = within(context, self.snapshot(name)).await;
                    let _ = reply.send(result);
                }
                Job::Memory(reply) => {
                    let result = within(context, self.memory()).await;
                    let _ = reply.send(result);
                }
                Job::Console(reply) => {
                    let live = self.live.as_ref();
                    let lines = live.map(|live| live.machine.console().lines());
                    let _ = reply.send(Ok(lines.unwrap_or_default()));
                }
                Job::Disk(reply) => {
                    let result = within(context, self.disk()).await;
                    let _ = reply.send(result);
                }
                Job::Network(policy, reply) => {
                    let result = within(context, self.set_network(policy)).await;
                    let _ = reply.send(result);
                }
                Job::LimitDisk(limits, reply) => {
                    let result = within(context, self.limit_disk(limits)).await;
                    let _ = reply.send(result);
                }
                Job::Destroy(reply) => {
                    within(context, self.destroy("It was asked for")).await;
                    let _ = reply.send(Ok(()));
                    return refuse_all(jobs, &self.cell.row().id);
                }
            }
        }
    }

    pub(super) async fn pause(&mut self) -> Result<Sandbox, ApiError> {
        let row = self.cell.row();
        let Some(mut live) = self.live.take() else {
            return Err(self.no_vmm().await);
        };
        let left = self.cell.connections().drain(self.host.drain_time).await;
        if left > 0 {
            tracing::info!(sandbox_id = %row.id, left, "Closed what was under way to its guest");
        }
        let guest = Guest::at(self.cell.address()).with_token(row.access_token.clone());
        let paused = match take(&self.host, &row, &mut live, &guest, Purpose::Pause).await {
            Ok(taken) => self.record_pause(taken).await,
            Err(error) => Err(error),
        };
        match paused {
            Ok(()) => {
                give_back(&self.host, &row, Some(live)).await;
                self.settle(SandboxState::Paused, None).await;
                self.collect_garbage().await;
                Ok(self.cell.view())
            }
            Err(error) => Err(self.back_to_running(live, error).await),
        }
    }

    /// From here on the sandbox is its build: one transaction says so.
    async fn record_pause(&self, taken: Taken) -> Result<(), OperationError> {
        let Taken {
            row: build,
            reservation,
        } = taken;
        let mut row = self.cell.row();
        row.enter(SandboxState::Paused, crate::clock::now_ms());
        row.build = Some(build.id);
        row.reason = None;
        let (id, generation) = (build.id, build.generation);
        let record = move |connection: &mut rusqlite::Connection| {
            builds::put_with_sandbox(connection, &build, &row)
        };
        if let Err(error) = self.host.catalogue.call(record).await {
            match self.host.store.remove(&id) {
                Ok(()) => return Err(error.into()),
                // It can't be unpublished, so the pause stands: were the guest to go on, a
                // crash would bring this build back as if it were the newest.
                Err(second) => {
                    tracing::error!(build_id = %id, %error, %second, "A pause is not recorded");
                }
            }
        }
        drop(reservation);
        self.cell.update(|row| row.build = Some(id));
        self.cell.set_generation(Some(generation.get()));
        Ok(())
    }

    async fn resume(&mut self, request: ResumeSandbox) -> Result<Sandbox, ApiError> {
        let row = self.cell.row();
        let Some(build) = row.build else {
            return Err(self.no_vmm().await);
        };
        let restored = restore::restore(&self.host, &row, build).await;
        if let (Ok(_), Some(_)) = (&restored, request.timeout_s) {
            let asked = SetTimeout {
                timeout_s: request.timeout_s,
                extend_only: false,
            };
            self.cell
                .update(|row| row.lifetime.set(asked, false, crate::clock::now_ms()));
        }
        match self.keep(&row, restored).await {
            Ok(()) => {
                self.cell.settle(SandboxState::Running, None);
                Ok(self.cell.view())
            }
            Err(error) => {
                let error = error.into_api("The sandbox stays paused and its build is untouched");
                self.settle(SandboxState::Paused, Some(error.to_string()))
                    .await;
                Err(error)
            }
        }
    }

    /// The generation of its newest build, as the catalogue has it.
    async fn generation(&self) -> Option<u32> {
        let build = self.cell.row().build?;
        let lookup = move |connection: &mut rusqlite::Connection| builds::get(connection, build);
        Some(
            self.host
                .catalogue
                .call(lookup)
                .await
                .ok()??
                .generation
                .get(),
        )
    }

    /// Stored first: after a crash in between, the next resume applies it.
    async fn set_network(&mut self, policy: NetworkPolicy) -> Result<Sandbox, ApiError> {
        if self.cell.state() == SandboxState::Failed {
            return Err(Denied::Failed.into());
        }
        let before = self.cell.row().network;
        self.store_change(|row| row.network = policy.clone())
            .await?;
        if self.live.is_some() {
            let slot = self.cell.row().slot;
            if let Err(error) = self.host.slots.set_policy(slot, policy).await {
                self.store_change(|row| row.network = before.clone())
                    .await?;
                return Err(ApiError::failed("network_failed", &error));
            }
        }
        Ok(self.cell.view())
    }

    /// Changes the row, stored first.
    pub(super) async fn store_change(
        &self,
        change: impl Fn(&mut SandboxRow),
    ) -> Result<(), ApiError> {
        let mut row = self.cell.row();
        change(&mut row);
        let put = move |connection: &mut rusqlite::Connection| sandboxes::put(connection, &row);
        let stored = self.host.catalogue.call(put).await;
        stored.map_err(|error| ApiError::failed("catalogue_failed", &error))?;
        self.cell.update(change);
        Ok(())
    }

    async fn memory(&self) -> Result<MemoryStats, ApiError> {
        let row = self.cell.row();
        let mut stats = MemoryStats {
            guest_pages: row.shape.memory().pages().get(),
            page_bytes: row.shape.memory().page_size.bytes(),
            ..MemoryStats::default()
        };
        if let Some(build) = row.build {
            let lookup =
                move |connection: &mut rusqlite::Connection| builds::get(connection, build);
            let found = self.host.catalogue.call(lookup).await;
            let found = found.map_err(|error| ApiError::failed("catalogue_failed", &error))?;
            stats.diff_pages = found.map(|build| build.stored_pages);
        }
        match &self.live {
            None => {}
            Some(Live { session: None, .. }) => stats.resident_pages = stats.guest_pages,
            Some(Live {
                session: Some(session),
                ..
            }) => {
                let served = session.attachment.stats().await;
                let served = served.map_err(|error| ApiError::failed("engine_failed", &error))?;
                stats.resident_pages = served.pages_installed;
                stats.faults = served.faults;
                stats.fault_us_p50 = served.service_us_p50;
                stats.fault_us_p99 = served.service_us_p99;
                stats.fault_us_max = served.service_us_max;
                stats.replayed_pages = served.pages_replayed;
                stats.replay_hits = served.replay_hits;
                stats.loaded_pages = served.pages_loaded;
            }
        }
        Ok(stats)
    }

    async fn disk(&self) -> Result<DiskStats, ApiError> {
        let row = self.cell.row();
        let host = self.host.clone();
        let is_live = self.live.is_some();
        let asking = tokio::task::spawn_blocking(move || match row.build {
            _ if is_live => host.disks.usage(row.id.as_str()),
            Some(build) => disks::usage_of(&host.store.path(&build)),
            None => Ok(Usage::default()),
        });
        let asked = asking.await.map_err(|_| OperationError::Worker);
        let usage = asked.and_then(|usage| Ok(usage?));
        let usage = usage.map_err(|error| ApiError::failed("disk_failed", &error))?;
        Ok(DiskStats {
            backend: self.host.disks.backend().to_owned(),
            size_bytes: usage.size_bytes,
            stored_bytes: usage.stored_bytes,
            limit_bytes: usage.limit_bytes,
            full: usage.is_full,
        })
    }

    pub(super) async fn destroy(&mut self, reason: &str) {
        let row = self.cell.row();
        if let Some(live) = self.live.take() {
            // What it touched first is of use to its siblings.
            if let Some(session) = &live.session {
                session.attachment.settle().await;
            }
            give_back(&self.host, &row, Some(live)).await;
        }
        self.forget(reason).await;
        tracing::info!(sandbox_id = %row.id, reason, "Deleted");
    }

    /// The last of it: its row, and the builds that only it needed.
    async fn forget(&self, reason: &str) {
        let id = self.cell.row().id;
        let removed = id.clone();
        let remove =
            move |connection: &mut rusqlite::Connection| sandboxes::remove(connection, &removed);
        if let Err(error) = self.host.catalogue.call(remove).await {
            tracing::error!(sandbox_id = %id, %error, "Its row is left over");
        } else {
            self.host.slots.release(self.cell.row().slot);
        }
        self.cell.set_gone(reason);
        self.collect_garbage().await;
    }

    /// A failed operation on a live guest: it goes on as if nothing had been asked.
    pub(super) async fn back_to_running(
        &mut self,
        mut live: Live,
        error: OperationError,
    ) -> ApiError {
        match live.go_on().await {
            Ok(()) => {
                self.live = Some(live);
                let error = error.into_api("The sandbox goes on running");
                self.settle(SandboxState::Running, Some(error.to_string()))
                    .await;
                error
            }
            Err(second) => {
                let reason = format!("{error}; then its guest could not go on: {second}");
                self.live = Some(live);
                self.vmm_ended(reason).await;
                error.into_api("The sandbox has failed: its guest could not go on")
            }
        }
    }

    /// The VMM is gone or useless: give everything back and say why.
    async fn vmm_ended(&mut self, reason: String) {
        let row = self.cell.row();
        tracing::warn!(sandbox_id = %row.id, reason, "Failed");
        give_back(&self.host, &row, self.live.take()).await;
        self.settle(SandboxState::Failed, Some(reason)).await;
    }

    pub(super) async fn no_vmm(&mut self) -> ApiError {
        let reason = "The sandbox has neither a VMM nor a build".to_owned();
        self.settle(SandboxState::Failed, Some(reason.clone()))
            .await;
        ApiError::Failed {
            code: "internal",
            detail: reason,
        }
    }

    /// The daemon stops: what was busy when the others were paused is paused now, and what
    /// can't be is ended.
    async fn leave(&mut self) {
        if self.live.is_none() {
            return;
        }
        let mut reason = "The daemon stopped and it could not be paused".to_owned();
        if self.cell.begin(Operation::Pause).is_ok() {
            match self.pause().await {
                Ok(_) => return,
                Err(error) => reason = format!("{reason}: {error}"),
            }
        }
        if self.live.is_some() {
            self.vmm_ended(reason).await;
        }
    }

    /// Stores a state, then shows it.
    pub(super) async fn settle(&self, state: SandboxState, reason: Option<String>) {
        if let Err(error) = self.store(state, reason.clone()).await {
            let id = self.cell.row().id;
            tracing::error!(sandbox_id = %id, %error, "Its state could not be stored");
        }
        self.cell.settle(state, reason);
    }

    async fn store(
        &self,
        state: SandboxState,
        reason: Option<String>,
    ) -> Result<(), CatalogueError> {
        let mut row = self.cell.row();
        row.enter(state, crate::clock::now_ms());
        row.reason = reason;
        let put = move |connection: &mut rusqlite::Connection| sandboxes::put(connection, &row);
        self.host.catalogue.call(put).await
    }

    pub(super) async fn collect_garbage(&self) {
        if let Err(error) = self.host.collect_garbage().await {
            tracing::warn!(%error, "Builds that nobody needs may be left over");
        }
    }
}

/// Jobs that came too late.
fn refuse_all(mut jobs: mpsc::Receiver<Given>, id: &http_api::ids::SandboxId) {
    jobs.close();
    let error = || ApiError::NotFound {
        what: "sandbox",
        name: id.to_string(),
    };
    while let Ok(given) = jobs.try_recv() {
        match given.job {
            Job::Pause(reply)
            | Job::Resume(_, reply)
            | Job::Timeout(_, reply)
            | Job::Network(_, reply)
            | Job::LimitDisk(_, reply) => drop(reply.send(Err(error()))),
            Job::Snapshot(_, reply) => drop(reply.send(Err(error()))),
            Job::Memory(reply) => drop(reply.send(Err(error()))),
            Job::Console(reply) => drop(reply.send(Err(error()))),
            Job::Disk(reply) => drop(reply.send(Err(error()))),
            Job::Destroy(reply) => drop(reply.send(Ok(()))),
        }
    }
}
