//! Whoever answers: the one interface between HTTP and a daemon.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;

use crate::auth::{Scope, TokenHash};
use crate::ids::{SandboxId, TemplateName};
use crate::problem::ApiError;
use crate::wire::{
    ConsoleLine, CreateSandbox, CreateSnapshot, Created, DiskLimits, DiskStats, Drained, Event,
    ExecRequest, ExecResult, ForkSandbox, GuestMetrics, HostInfo, MemoryStats, NetworkPolicy,
    Reconciled, ResumeSandbox, Sandbox, SandboxState, SetTimeout, Snapshot,
};

/// Whether the daemon takes requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It does.
    Ready,
    /// It does not, and why.
    NotReady(String),
}

/// A sandbox that something is to be done to, and in which of its runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aim {
    /// Which.
    pub id: SandboxId,
    /// Only if its newest run is this one.
    pub execution_id: Option<String>,
}

impl From<SandboxId> for Aim {
    /// Whatever run it is in.
    fn from(id: SandboxId) -> Self {
        Self {
            id,
            execution_id: None,
        }
    }
}

impl Aim {
    /// Whether the sandbox that was found is in the run that was meant.
    ///
    /// # Errors
    /// It is in another one, which is told.
    pub fn check(&self, newest: Option<&str>) -> Result<(), ApiError> {
        match &self.execution_id {
            Some(meant) if newest != Some(meant.as_str()) => Err(ApiError::OtherRun {
                id: self.id.to_string(),
                execution_id: newest.map(str::to_owned),
            }),
            _ => Ok(()),
        }
    }
}

/// Events as they happen.
pub type EventStream = Pin<Box<dyn Stream<Item = Event> + Send>>;

/// The operations behind the routes. An operation goes on when its client goes away:
/// implementations must not tie their work to the life of the returned future.
pub trait ControlPlane: Clone + Send + Sync + 'static {
    /// Whether requests are taken.
    fn readiness(&self) -> impl Future<Output = Readiness> + Send;
    /// What a token allows; nothing when there is no such token.
    fn scope(
        &self,
        token: TokenHash,
    ) -> impl Future<Output = Result<Option<Scope>, ApiError>> + Send;
    /// What this host is.
    fn host(&self) -> impl Future<Output = Result<HostInfo, ApiError>> + Send;

    /// Numbers for Prometheus, as OpenMetrics text.
    fn prometheus(&self) -> impl Future<Output = Result<String, ApiError>> + Send;
    /// Takes no new work and writes everything that runs to disk.
    fn drain(&self) -> impl Future<Output = Result<Drained, ApiError>> + Send;
    /// Looks for what belongs to nobody on this host, and removes it.
    fn reconcile(&self) -> impl Future<Output = Result<Reconciled, ApiError>> + Send;
    /// Takes work again.
    fn undrain(&self) -> impl Future<Output = Result<(), ApiError>> + Send;
    /// What happens from now on, or has happened since an event. Ends with the daemon.
    fn events(
        &self,
        after: Option<u64>,
    ) -> impl Future<Output = Result<EventStream, ApiError>> + Send;

    /// Makes a sandbox and waits until it runs. The same request with the same id a second time
    /// is answered with the sandbox of the first; another one with that id is refused.
    fn create(
        &self,
        request: CreateSandbox,
    ) -> impl Future<Output = Result<Created, ApiError>> + Send;
    /// All sandboxes, by id.
    fn list(&self) -> impl Future<Output = Result<Vec<Sandbox>, ApiError>> + Send;
    /// One sandbox.
    fn get(&self, id: SandboxId) -> impl Future<Output = Result<Sandbox, ApiError>> + Send;
    /// Writes it to disk and ends its process.
    fn pause(&self, aim: Aim) -> impl Future<Output = Result<Sandbox, ApiError>> + Send;
    /// Brings it back.
    fn resume(
        &self,
        aim: Aim,
        request: ResumeSandbox,
    ) -> impl Future<Output = Result<Sandbox, ApiError>> + Send;
    /// Waits until it is in one of these states, and says how it is when that is so or the time is
    /// up.
    fn wait(
        &self,
        id: SandboxId,
        states: Vec<SandboxState>,
        patience: Duration,
    ) -> impl Future<Output = Result<Sandbox, ApiError>> + Send;
    /// Changes how long it may run.
    fn set_timeout(
        &self,
        aim: Aim,
        request: SetTimeout,
    ) -> impl Future<Output = Result<Sandbox, ApiError>> + Send;
    /// Makes running copies of it, which go on from where it is; it goes on, too. Each may fail by
    /// itself.
    fn fork(
        &self,
        aim: Aim,
        request: ForkSandbox,
    ) -> impl Future<Output = Result<Vec<Result<Sandbox, ApiError>>, ApiError>> + Send;
    /// How busy its guest is.
    fn metrics(&self, id: SandboxId)
    -> impl Future<Output = Result<GuestMetrics, ApiError>> + Send;
    /// Runs a command in it and collects the output.
    fn exec(
        &self,
        id: SandboxId,
        request: ExecRequest,
    ) -> impl Future<Output = Result<ExecResult, ApiError>> + Send;
    /// What its memory did since it was last resumed.
    fn memory(&self, id: SandboxId) -> impl Future<Output = Result<MemoryStats, ApiError>> + Send;
    /// The last lines of its console since it began to run; none while it is paused.
    fn console(
        &self,
        id: SandboxId,
    ) -> impl Future<Output = Result<Vec<ConsoleLine>, ApiError>> + Send;
    /// What its disk takes on the host.
    fn disk(&self, id: SandboxId) -> impl Future<Output = Result<DiskStats, ApiError>> + Send;
    /// Replaces what it may reach, at once if it runs.
    fn set_network(
        &self,
        id: SandboxId,
        policy: NetworkPolicy,
    ) -> impl Future<Output = Result<Sandbox, ApiError>> + Send;
    /// Replaces how much it may do with its disk, at once if it runs.
    fn limit_disk(
        &self,
        id: SandboxId,
        limits: DiskLimits,
    ) -> impl Future<Output = Result<Sandbox, ApiError>> + Send;
    /// Removes it in whatever state it is.
    fn delete(&self, aim: Aim) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// Makes a template of a sandbox, which goes on.
    fn create_snapshot(
        &self,
        request: CreateSnapshot,
    ) -> impl Future<Output = Result<Snapshot, ApiError>> + Send;
    /// All templates, by name.
    fn list_snapshots(&self) -> impl Future<Output = Result<Vec<Snapshot>, ApiError>> + Send;
    /// One template.
    fn get_snapshot(
        &self,
        name: TemplateName,
    ) -> impl Future<Output = Result<Snapshot, ApiError>> + Send;
    /// Removes a template; sandboxes made from it are untouched.
    fn delete_snapshot(
        &self,
        name: TemplateName,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;
}
