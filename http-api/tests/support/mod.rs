//! A control plane that only plays.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::collections::BTreeMap;
use std::time::Duration;

use http_api::auth::{Scope, TokenHash};
use http_api::ids::{SandboxId, TemplateName};
use http_api::wire::{
    CreateSandbox, CreateSnapshot, Created, ExecRequest, ExecResult, ForkSandbox, GuestMetrics,
    HostInfo, MemoryStats, NetworkPolicy, OnTimeout, ResumeSandbox, Sandbox, SandboxState,
    SetTimeout, Snapshot, SnapshotKind, VmmInfo,
};
use http_api::{ApiError, ControlPlane, Readiness};

/// A token for everything.
pub(crate) const FULL: &str = "e2b_full";
/// A token for metrics.
pub(crate) const METRICS: &str = "e2b_metrics";

/// Answers everything with fixed values, or everything with one error.
#[derive(Clone, Default)]
pub(crate) struct Fake {
    pub(crate) error: Option<ApiError>,
    pub(crate) not_ready: Option<&'static str>,
}

impl Fake {
    pub(crate) fn refusing(error: ApiError) -> Self {
        let error = Some(error);
        Self {
            error,
            ..Self::default()
        }
    }

    fn answer<T>(&self, value: T) -> Result<T, ApiError> {
        self.error.clone().map_or(Ok(value), Err)
    }
}

pub(crate) fn sandbox(id: SandboxId, state: SandboxState) -> Sandbox {
    Sandbox {
        id,
        state,
        template: "base".parse().unwrap(),
        vcpus: 1,
        memory_mb: 256,
        address: "10.0.0.1".into(),
        created_at_ms: 5,
        build: None,
        generation: None,
        reason: None,
        labels: BTreeMap::new(),
        network: NetworkPolicy::default(),
        disk_mb: 128,
        started_at_ms: 5,
        expires_at_ms: None,
        time_left_ms: None,
        on_timeout: OnTimeout::Kill,
        auto_resume: false,
        execution_id: None,
        access_token: None,
    }
}

fn snapshot(name: TemplateName) -> Snapshot {
    Snapshot {
        name,
        kind: SnapshotKind::Memory,
        build: Some("ab".repeat(16)),
        generation: Some(2),
        vcpus: 1,
        memory_mb: 256,
        diff_pages: Some(7),
        created_at_ms: 5,
        disk_mb: 128,
        sandbox: None,
    }
}

impl ControlPlane for Fake {
    async fn readiness(&self) -> Readiness {
        self.not_ready.map_or(Readiness::Ready, |reason| {
            Readiness::NotReady(reason.to_owned())
        })
    }
    async fn scope(&self, token: TokenHash) -> Result<Option<Scope>, ApiError> {
        let known = [(FULL, Scope::Full), (METRICS, Scope::Metrics)];
        let found = known
            .into_iter()
            .find(|(known, _)| TokenHash::of(known).matches(&token));
        Ok(found.map(|(_, scope)| scope))
    }
    async fn host(&self) -> Result<HostInfo, ApiError> {
        self.answer(HostInfo {
            version: "0".into(),
            vmm: VmmInfo {
                name: "fake".into(),
                version: "1".into(),
                accelerator: "none".into(),
                reason: "a test".into(),
            },
            disks: "none".into(),
            shards: 1,
            engines: 1,
            sandboxes: 0,
        })
    }
    async fn create(&self, request: CreateSandbox) -> Result<Created, ApiError> {
        let existed = request.id.as_ref().is_some_and(|id| id.as_str() == "there");
        let id = request.id.unwrap_or_else(|| "chosen".parse().unwrap());
        let mut made = sandbox(id, SandboxState::Running);
        made.template = request.template;
        made.vcpus = request.vcpus.unwrap_or(1);
        made.memory_mb = request.memory_mb.unwrap_or(256);
        made.labels = request.labels;
        made.network = request.network;
        made.time_left_ms = request.timeout_s.map(|seconds| seconds * 1000);
        made.on_timeout = request.on_timeout;
        made.auto_resume = request.auto_resume;
        self.answer(Created {
            sandbox: made,
            existed,
        })
    }
    async fn list(&self) -> Result<Vec<Sandbox>, ApiError> {
        self.answer(vec![sandbox("a".parse().unwrap(), SandboxState::Paused)])
    }
    async fn get(&self, id: SandboxId) -> Result<Sandbox, ApiError> {
        let mut found = sandbox(id, SandboxState::Running);
        found.access_token = Some("secret".into());
        self.answer(found)
    }
    async fn pause(&self, id: SandboxId) -> Result<Sandbox, ApiError> {
        self.answer(sandbox(id, SandboxState::Paused))
    }
    async fn wait(
        &self,
        id: SandboxId,
        states: Vec<SandboxState>,
        _: Duration,
    ) -> Result<Sandbox, ApiError> {
        self.answer(sandbox(id, states[0]))
    }
    async fn set_timeout(&self, id: SandboxId, request: SetTimeout) -> Result<Sandbox, ApiError> {
        let mut changed = sandbox(id, SandboxState::Running);
        changed.expires_at_ms = request.timeout_s;
        self.answer(changed)
    }
    async fn fork(
        &self,
        _: SandboxId,
        request: ForkSandbox,
    ) -> Result<Vec<Result<Sandbox, ApiError>>, ApiError> {
        let fork = |n| sandbox(format!("f{n}").parse().unwrap(), SandboxState::Running);
        let full = || ApiError::Full {
            detail: "No room for the last".into(),
        };
        let made = (1..request.count).map(|n| Ok(fork(n)));
        self.answer(made.chain([Err(full())]).collect())
    }
    async fn metrics(&self, _: SandboxId) -> Result<GuestMetrics, ApiError> {
        self.answer(GuestMetrics {
            timestamp_s: 1_700_000_000,
            cpu_count: 1,
            memory_total_bytes: 1 << 28,
            ..GuestMetrics::default()
        })
    }
    async fn resume(&self, id: SandboxId, _: ResumeSandbox) -> Result<Sandbox, ApiError> {
        self.answer(sandbox(id, SandboxState::Running))
    }
    async fn exec(&self, id: SandboxId, request: ExecRequest) -> Result<ExecResult, ApiError> {
        self.answer(ExecResult {
            exit_code: 3,
            status: "exit status 3".into(),
            stdout: format!("{id}: {} {:?}", request.cmd, request.args),
            stderr: format!("{} ms", request.timeout_ms),
        })
    }
    async fn set_network(&self, id: SandboxId, policy: NetworkPolicy) -> Result<Sandbox, ApiError> {
        let mut changed = sandbox(id, SandboxState::Running);
        changed.network = policy;
        self.answer(changed)
    }
    async fn memory(&self, _: SandboxId) -> Result<MemoryStats, ApiError> {
        self.answer(MemoryStats {
            guest_pages: 65_536,
            page_bytes: 4096,
            faults: 9,
            fault_us_p99: 12.5,
            ..MemoryStats::default()
        })
    }
    async fn delete(&self, _: SandboxId) -> Result<(), ApiError> {
        self.answer(())
    }
    async fn create_snapshot(&self, request: CreateSnapshot) -> Result<Snapshot, ApiError> {
        self.answer(snapshot(
            request.name.unwrap_or_else(|| "made".parse().unwrap()),
        ))
    }
    async fn list_snapshots(&self) -> Result<Vec<Snapshot>, ApiError> {
        self.answer(vec![snapshot("t".parse().unwrap())])
    }
    async fn get_snapshot(&self, name: TemplateName) -> Result<Snapshot, ApiError> {
        self.answer(snapshot(name))
    }
    async fn delete_snapshot(&self, _: TemplateName) -> Result<(), ApiError> {
        self.answer(())
    }
}
