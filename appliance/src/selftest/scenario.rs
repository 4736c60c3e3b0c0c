//! The trial itself: every step over HTTP, as a scheduler would.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use http_api::wire::{
    ExecRequest, ExecResult, HostInfo, MemoryStats, Sandbox, SandboxState, Snapshot, SnapshotKind,
};
use serde_json::json;

use super::leftovers;
use super::report::Report;
use crate::args::TryArgs;
use crate::client::Client;

/// Starts the ids of the trial's sandboxes.
pub(super) const PREFIX: &str = "try";
const ORIGINAL: &str = "tryone";
const CLONES: [&str; 2] = ["tryclonea", "trycloneb"];
const TEMPLATE: &str = "try-snapshot";

/// Counts for ever, twenty times a second, in memory.
const COUNTER: &str = "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /run/count.new; \
                       mv /run/count.new /run/count; sleep 0.05; done' \
                       </dev/null >/dev/null 2>&1 & echo $!";

/// Plays all steps, writing what they cost into the report as it goes.
pub(super) async fn play(client: &Client, args: &TryArgs, report: &mut Report) -> Result<()> {
    let trial = Trial { client };
    let host: HostInfo = client.get("/v1/host").await?;
    report.vmm = format!(
        "{} {} on {}",
        host.vmm.name, host.vmm.version, host.vmm.accelerator
    );
    report.vmm_reason = host.vmm.reason;
    report.disks = host.disks;
    trial
        .clean_up()
        .await
        .context("Removing what an earlier trial left")?;

    let body = json!({ "id": ORIGINAL, "template": "base" });
    let created = trial
        .step(
            report,
            "create from template base",
            client.post::<Sandbox>("/v1/sandboxes", &body),
        )
        .await?;
    ensure!(
        created.state == SandboxState::Running,
        "it is {} after its creation",
        created.state
    );
    let kernel = trial
        .step(report, "run a command", trial.shell(ORIGINAL, "uname -r"))
        .await?;
    ensure!(!kernel.is_empty(), "uname printed nothing");

    let counter = trial
        .step(
            report,
            "start a process that counts",
            trial.shell(ORIGINAL, COUNTER),
        )
        .await?;
    let fill = format!(
        "dd if=/dev/urandom of=/run/fill bs=1M count={} 2>/dev/null && sha256sum < /run/fill",
        args.fill_mb
    );
    let before = trial
        .step(
            report,
            &format!("fill {} MiB with random data", args.fill_mb),
            trial.shell(ORIGINAL, &fill),
        )
        .await?;

    let counted = trial.count(ORIGINAL).await?;
    let paused = trial
        .step(report, "pause", trial.operate(ORIGINAL, "pause"))
        .await?;
    ensure!(
        paused.state == SandboxState::Paused,
        "it is {} after its pause",
        paused.state
    );
    ensure!(
        !leftovers::vmm_runs(ORIGINAL),
        "a VMM of the paused sandbox runs still"
    );
    let stats: MemoryStats = client
        .get(&format!("/v1/sandboxes/{ORIGINAL}/memory"))
        .await?;
    report.guest_pages = stats.guest_pages;
    report.base_pages = stats.diff_pages.unwrap_or(0);

    let resumed = trial
        .step(report, "resume", trial.operate(ORIGINAL, "resume"))
        .await?;
    ensure!(
        resumed.address == paused.address,
        "its address changed to {}",
        resumed.address
    );
    let stats: MemoryStats = client
        .get(&format!("/v1/sandboxes/{ORIGINAL}/memory"))
        .await?;
    report.pages_resident_after_resume = stats.resident_pages;
    let survived = trial
        .step(
            report,
            "first command after the resume",
            trial.survived(ORIGINAL, &counter, counted),
        )
        .await?;
    let after = trial
        .step(
            report,
            "hash its memory again",
            trial.shell(ORIGINAL, "sha256sum < /run/fill"),
        )
        .await?;
    let stats: MemoryStats = client
        .get(&format!("/v1/sandboxes/{ORIGINAL}/memory"))
        .await?;
    report.faults = stats.faults;
    report.fault_us_p50 = stats.fault_us_p50;
    report.fault_us_p99 = stats.fault_us_p99;

    let body = json!({ "sandbox": ORIGINAL, "name": TEMPLATE });
    let snapshot = trial
        .step(
            report,
            "snapshot to a template",
            client.post::<Snapshot>("/v1/snapshots", &body),
        )
        .await?;
    report.diff_pages = snapshot.diff_pages.unwrap_or(0);
    let mut intact = before == after;
    let mut alive = survived;
    for clone in CLONES {
        let counted = trial.count(ORIGINAL).await?;
        let body = json!({ "id": clone, "template": TEMPLATE });
        trial
            .step(
                report,
                &format!("create {clone} from it"),
                client.post::<Sandbox>("/v1/sandboxes", &body),
            )
            .await?;
        let hash = trial.shell(clone, "sha256sum < /run/fill").await?;
        intact &= hash == before;
        // It goes on from the snapshot, which is older than what the original counts now.
        alive &= trial.survived(clone, &counter, counted.min(1)).await?;
    }
    report.memory_intact = intact;
    report.process_survived = alive;
    report.clones_are_separate = trial.clones_are_separate(&counter).await?;

    let started = Instant::now();
    trial.clean_up().await?;
    report.time("destroy all", started.elapsed());
    Ok(())
}

struct Trial<'a> {
    client: &'a Client,
}

impl Trial<'_> {
    /// Times one step and says which it was if it fails.
    async fn step<T, E: Into<anyhow::Error>>(
        &self,
        report: &mut Report,
        name: &str,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T> {
        let started = Instant::now();
        let notice = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            eprintln!("· {name} …");
            std::future::pending::<()>().await;
        };
        let result = tokio::select! {
            result = work => result,
            () = notice => bail!("a pending future ended"),
        };
        report.time(name, started.elapsed());
        result
            .map_err(Into::into)
            .with_context(|| format!("Step “{name}”"))
    }

    async fn operate(&self, id: &str, operation: &str) -> Result<Sandbox> {
        Ok(self
            .client
            .post(&format!("/v1/sandboxes/{id}/{operation}"), &json!({}))
            .await?)
    }

    /// What a shell command printed; a failed command is an error.
    async fn shell(&self, id: &str, script: &str) -> Result<String> {
        let request = ExecRequest {
            cmd: "sh".into(),
            args: vec!["-c".into(), script.into()],
            env: Default::default(),
            cwd: None,
            user: Some("root".into()),
            timeout_ms: 120_000,
        };
        let result: ExecResult = self
            .client
            .post(&format!("/v1/sandboxes/{id}/exec"), &request)
            .await?;
        ensure!(
            result.exit_code == 0,
            "{script:?} in {id}: {} {}",
            result.status,
            result.stderr
        );
        Ok(result.stdout.trim().to_owned())
    }

    async fn count(&self, id: &str) -> Result<u64> {
        let text = self.shell(id, "cat /run/count").await?;
        text.parse()
            .with_context(|| format!("{text:?} is no count"))
    }

    /// Whether the counter is the same process and goes on from where it was.
    async fn survived(&self, id: &str, pid: &str, counted: u64) -> Result<bool> {
        let alive = self
            .shell(id, &format!("kill -0 {pid} && cat /run/count"))
            .await;
        let Ok(Ok(now)) = alive.map(|text| text.parse::<u64>()) else {
            return Ok(false);
        };
        self.shell(id, "sleep 0.2").await?;
        let later = self.count(id).await?;
        Ok(now >= counted && later > now)
    }

    /// What one clone does to its disk and its processes, the other must not see.
    async fn clones_are_separate(&self, counter: &str) -> Result<bool> {
        let [a, b] = CLONES;
        self.shell(a, "echo mine > /root/only-here && sync").await?;
        self.shell(a, &format!("kill -9 {counter}")).await?;
        let seen = self
            .shell(b, "ls /root/only-here 2>/dev/null || echo nothing")
            .await?;
        let stopped = {
            let first = self.count(a).await?;
            self.shell(a, "sleep 0.2").await?;
            self.count(a).await? == first
        };
        let goes_on = self.survived(b, counter, 1).await?;
        let names = (
            self.shell(a, "hostname").await?,
            self.shell(b, "hostname").await?,
        );
        Ok(seen == "nothing" && stopped && goes_on && names.0 != names.1)
    }

    /// Removes every sandbox and every template with memory: this daemon is the trial's own.
    async fn clean_up(&self) -> Result<()> {
        for sandbox in self.client.get::<Vec<Sandbox>>("/v1/sandboxes").await? {
            self.client
                .delete(&format!("/v1/sandboxes/{}", sandbox.id))
                .await?;
        }
        for snapshot in self.client.get::<Vec<Snapshot>>("/v1/snapshots").await? {
            if snapshot.kind == SnapshotKind::Memory {
                self.client
                    .delete(&format!("/v1/snapshots/{}", snapshot.name))
                    .await?;
            }
        }
        Ok(())
    }
}
