//! A control plane that only plays.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::collections::BTreeMap;
use std::time::Duration;

use axum::body::Body;
use futures_util::{StreamExt, stream};
use http_api::auth::{Scope, TokenHash};
use http_api::ids::{SandboxId, TemplateName};
use http_api::wire::process::{
    FileEntry, FilePlace, ProcessInfo, ProcessOutput, Signal, StartProcess, TerminalSize, Which,
    WrittenFile,
};
use http_api::wire::{
    Capacity, ConsoleLine, CpuInfo, CreateSandbox, CreateSnapshot, Created, DiskLimits, DiskStats,
    Drained, Event, EventKind, ExecRequest, ExecResult, ForkSandbox, GuestMetrics, HostInfo,
    HostStatus, MemoryStats, NetworkPolicy, OnTimeout, Reconciled, ResumeSandbox, Sandbox,
    SandboxState, SetTimeout, Snapshot, SnapshotKind, VmmInfo,
};
use http_api::{
    Aim, ApiError, ControlPlane, EventStream, FileContent, ProcessStream, Processes, Readiness,
};
use http_body_util::BodyExt;
use tokio::sync::watch;

/// A token for everything.
pub(crate) const FULL: &str = "e2b_full";
/// A token for metrics.
pub(crate) const METRICS: &str = "e2b_metrics";

/// The run that all of its sandboxes are in.
pub(crate) const RUN: &str = "exec-7";

/// Answers everything with fixed values, or everything with one error.
#[derive(Clone, Default)]
pub(crate) struct Fake {
    pub(crate) error: Option<ApiError>,
    pub(crate) not_ready: Option<&'static str>,
    /// The process that was last sent a signal.
    pub(crate) killed: watch::Sender<u32>,
    /// What a sandbox was last allowed to reach.
    pub(crate) policy: watch::Sender<NetworkPolicy>,
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
        huge_pages: false,
        address: "10.0.0.1".into(),
        created_at_ms: 5,
        build: None,
        generation: None,
        reason: None,
        labels: BTreeMap::new(),
        network: NetworkPolicy::default(),
        disk_mb: 128,
        disk_limits: DiskLimits::default(),
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
        huge_pages: false,
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
            status: HostStatus::Ready,
            kernel: "6".into(),
            states: BTreeMap::new(),
            templates: 1,
            cpu: CpuInfo::default(),
            nodes: vec![],
            hugepages: vec![],
            capacity: Capacity::default(),
            vmm: VmmInfo {
                name: "fake".into(),
                version: "1".into(),
                accelerator: "none".into(),
                reason: "a test".into(),
            },
            disks: "none".into(),
            shards: 1,
            engines: 1,
            workers: "block".into(),
            sandboxes: 0,
        })
    }
    async fn prometheus(&self) -> Result<String, ApiError> {
        self.answer("thaw_draining 0\n# EOF\n".into())
    }
    async fn drain(&self) -> Result<Drained, ApiError> {
        self.answer(Drained::default())
    }
    async fn reconcile(&self) -> Result<Reconciled, ApiError> {
        self.answer(Reconciled::default())
    }
    async fn undrain(&self) -> Result<(), ApiError> {
        self.answer(())
    }
    async fn events(&self, after: Option<u64>) -> Result<EventStream, ApiError> {
        let event = move |n: u64| Event {
            id: after.unwrap_or(100) + n,
            at_ms: 5,
            kind: EventKind::State,
            sandbox: Some(["one", "two"][n as usize % 2].into()),
            state: Some(SandboxState::Paused),
            execution_id: None,
            reason: None,
        };
        self.answer(())?;
        Ok(Box::pin(stream::iter((1..=3).map(event))))
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
        found.network.egress_kbit_s = Some(5000);
        self.answer(found)
    }
    async fn pause(&self, aim: Aim) -> Result<Sandbox, ApiError> {
        aim.check(Some(RUN))?;
        self.answer(sandbox(aim.id, SandboxState::Paused))
    }
    async fn wait(
        &self,
        id: SandboxId,
        states: Vec<SandboxState>,
        _: Duration,
    ) -> Result<Sandbox, ApiError> {
        self.answer(sandbox(id, states[0]))
    }
    async fn set_timeout(&self, aim: Aim, request: SetTimeout) -> Result<Sandbox, ApiError> {
        aim.check(Some(RUN))?;
        let mut changed = sandbox(aim.id, SandboxState::Running);
        changed.expires_at_ms = request.timeout_s;
        self.answer(changed)
    }
    async fn fork(
        &self,
        aim: Aim,
        request: ForkSandbox,
    ) -> Result<Vec<Result<Sandbox, ApiError>>, ApiError> {
        aim.check(Some(RUN))?;
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
    async fn resume(&self, aim: Aim, _: ResumeSandbox) -> Result<Sandbox, ApiError> {
        aim.check(Some(RUN))?;
        self.answer(sandbox(aim.id, SandboxState::Running))
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
        self.policy.send_replace(policy.clone());
        changed.network = policy;
        self.answer(changed)
    }
    async fn console(&self, _: SandboxId) -> Result<Vec<ConsoleLine>, ApiError> {
        let line = |at_ms, line: &str| ConsoleLine {
            at_ms,
            line: line.to_owned(),
        };
        self.answer(vec![
            line(1000, "first"),
            line(2000, "second"),
            line(2000, "third"),
        ])
    }
    async fn limit_disk(&self, id: SandboxId, limits: DiskLimits) -> Result<Sandbox, ApiError> {
        self.answer(Sandbox {
            disk_limits: limits,
            ..sandbox(id, SandboxState::Running)
        })
    }
    async fn disk(&self, _: SandboxId) -> Result<DiskStats, ApiError> {
        self.answer(DiskStats {
            backend: "reflink".into(),
            size_bytes: 1 << 30,
            stored_bytes: 4096,
            ..DiskStats::default()
        })
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
    async fn delete(&self, aim: Aim) -> Result<(), ApiError> {
        aim.check(Some(RUN))?;
        self.answer(())
    }
    async fn create_snapshot(&self, request: CreateSnapshot) -> Result<Snapshot, ApiError> {
        let aim = Aim {
            id: request.sandbox,
            execution_id: request.execution_id,
        };
        aim.check(Some(RUN))?;
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

impl Processes for Fake {
    async fn start(&self, _: SandboxId, process: StartProcess) -> Result<ProcessStream, ApiError> {
        self.answer(())?;
        if process.cmd == "absent" {
            return Err(ApiError::BadRequest {
                field: "cmd".into(),
                detail: "no such program".into(),
            });
        }
        let said = match process.terminal {
            Some(size) => ProcessOutput::Terminal(format!("{} {}", size.rows, size.cols).into()),
            None => ProcessOutput::Stdout(process.args.join(" ").into()),
        };
        let first = stream::iter([ProcessOutput::Started { pid: 7 }, said]);
        if process.cmd == "sleep" {
            // Until it is told to end.
            let mut killed = self.killed.subscribe();
            let end = stream::once(async move {
                let _ = killed.wait_for(|pid| *pid != 0).await;
                exit(-1)
            });
            return Ok(Box::pin(first.chain(end)));
        }
        Ok(Box::pin(first.chain(stream::iter([exit(3)]))))
    }
    async fn find(&self, _: SandboxId, which: Which) -> Result<ProcessStream, ApiError> {
        let again = [ProcessOutput::Started { pid: 8 }, exit(0)];
        match which {
            Which::Tag(tag) if tag == "mine" => Ok(Box::pin(stream::iter(again))),
            other => Err(ApiError::NotFound {
                what: "process",
                name: format!("{other:?}"),
            }),
        }
    }
    async fn input(&self, _: SandboxId, _: Which, _: bool, _: Vec<u8>) -> Result<(), ApiError> {
        self.answer(())
    }
    async fn resize(&self, _: SandboxId, _: Which, _: TerminalSize) -> Result<(), ApiError> {
        self.answer(())
    }
    async fn signal(&self, _: SandboxId, which: Which, _: Signal) -> Result<(), ApiError> {
        let pid = match which {
            Which::Pid(pid) => pid,
            Which::Tag(_) => 7,
        };
        self.killed.send_replace(pid);
        self.answer(())
    }
    async fn processes(&self, _: SandboxId) -> Result<Vec<ProcessInfo>, ApiError> {
        self.answer(vec![ProcessInfo {
            pid: 7,
            cmd: "sleep".into(),
            args: vec!["9".into()],
            cwd: None,
            tag: None,
        }])
    }
    async fn read_file(&self, _: SandboxId, place: FilePlace) -> Result<FileContent, ApiError> {
        self.answer(())?;
        Ok(FileContent {
            length: Some(place.path.len() as u64),
            body: place.path.into(),
        })
    }
    async fn write_file(
        &self,
        _: SandboxId,
        place: FilePlace,
        content: Body,
    ) -> Result<WrittenFile, ApiError> {
        let bytes = content.collect().await.unwrap().to_bytes();
        self.answer(WrittenFile {
            path: format!("{}: {}", place.path, bytes.len()),
        })
    }
    async fn list_files(
        &self,
        _: SandboxId,
        place: FilePlace,
        depth: u32,
    ) -> Result<Vec<FileEntry>, ApiError> {
        self.answer(match depth {
            1 => vec![],
            _ => vec![entry(&place.path)],
        })
    }
    async fn make_dir(&self, _: SandboxId, place: FilePlace) -> Result<FileEntry, ApiError> {
        if place.path == "/there" {
            return Err(ApiError::Exists {
                what: "directory",
                name: place.path,
            });
        }
        self.answer(entry(&place.path))
    }
    async fn remove_file(&self, _: SandboxId, _: FilePlace) -> Result<(), ApiError> {
        self.answer(())
    }
}

fn entry(path: &str) -> FileEntry {
    FileEntry {
        name: path.trim_start_matches('/').to_owned(),
        path: path.to_owned(),
        kind: "directory".into(),
        size: 4096,
        mode: 0o755,
        owner: "root".into(),
        group: "root".into(),
        modified: Some("1970-01-01T00:00:07Z".into()),
        symlink_target: None,
    }
}

fn exit(exit_code: i32) -> ProcessOutput {
    ProcessOutput::Exit {
        exit_code,
        status: "over".into(),
    }
}
