//! Sandboxes on the wire.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DiskLimits, NetworkPolicy};
use crate::ids::{SandboxId, TemplateName};

/// Where a sandbox is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// Being made; not usable yet.
    Creating,
    /// Its guest runs.
    Running,
    /// On its way to disk.
    Pausing,
    /// On disk; no process.
    Paused,
    /// On its way back.
    Resuming,
    /// A snapshot is being taken; the guest goes on after it.
    Snapshotting,
    /// It can only be deleted; `reason` says why.
    Failed,
    /// Being removed.
    Destroying,
}

impl fmt::Display for SandboxState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Snapshotting => "snapshotting",
            Self::Failed => "failed",
            Self::Destroying => "destroying",
        })
    }
}

impl SandboxState {
    /// Whether it stays as it is until somebody asks for something.
    #[must_use]
    pub const fn is_settled(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Failed)
    }
}

/// What becomes of a sandbox whose time is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It is deleted.
    #[default]
    Kill,
    /// It is paused, and has the same time again when it is resumed.
    Pause,
}

/// The longest time that a sandbox can be given, in seconds: a year.
pub const MAX_TIMEOUT_S: u64 = 366 * 24 * 3600;

/// `POST /v1/sandboxes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSandbox {
    /// What to start from.
    pub template: TemplateName,
    /// The id to give it; chosen by the host when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<SandboxId>,
    /// Virtual CPUs. A template with memory has them baked in: a differing number is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Memory in MiB. As for `vcpus`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u32>,
    /// Whether its memory is of huge pages (2 MiB), of which the host has to have enough. As for
    /// `vcpus`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<bool>,
    /// The disk in MiB: at least what the template's image has, and its ext4 file system is grown.
    /// A template with memory has it baked in. As in the template when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u64>,
    /// Environment of every process started later.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The caller's own notes, kept and returned.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// What it may reach; everything that the host leaves open when absent.
    #[serde(default)]
    pub network: NetworkPolicy,
    /// How much it may do with its disk; what the host lets all when absent.
    #[serde(default, skip_serializing_if = "DiskLimits::is_empty")]
    pub disk_limits: DiskLimits,
    /// How long it may run, in seconds; for ever when absent. Time that it is paused doesn't count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
    /// What becomes of it then.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Whether traffic for it brings it back while it is paused.
    #[serde(default)]
    pub auto_resume: bool,
}

/// A sandbox that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// It runs.
    pub sandbox: Sandbox,
    /// It was there already, made by the same request.
    pub existed: bool,
}

/// `POST /v1/sandboxes/{id}/resume`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResumeSandbox {
    /// How long it may run from now on, in seconds; what it had left when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
}

/// `POST /v1/sandboxes/{id}/timeout`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SetTimeout {
    /// How long it may run from now on, in seconds; `null` for ever. A paused one has this time
    /// when it is resumed. Mandatory: nobody gets for ever by leaving it out.
    #[serde(deserialize_with = "Option::deserialize")]
    #[schemars(required)]
    pub timeout_s: Option<u64>,
    /// Leave it as it is if it has longer already.
    #[serde(default)]
    pub extend_only: bool,
}

/// `POST /v1/sandboxes/{id}/fork`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkSandbox {
    /// How many, 1 to [`MAX_FORKS`].
    #[serde(default = "one")]
    pub count: u32,
    /// How long each may run, in seconds; for ever when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
}

/// The most forks of one request.
pub const MAX_FORKS: u32 = 20;

const fn one() -> u32 {
    1
}

/// `GET /v1/sandboxes/{id}/metrics`: how busy and how full the guest is, as it says itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GuestMetrics {
    /// Unix seconds.
    pub timestamp_s: u64,
    /// Virtual CPUs.
    pub cpu_count: u32,
    /// Of all of them together, since the last time somebody asked, in per cent.
    pub cpu_used_percent: f64,
    /// Memory, in bytes.
    pub memory_total_bytes: u64,
    /// Without the page cache.
    pub memory_used_bytes: u64,
    /// The page cache.
    pub memory_cache_bytes: u64,
    /// The root file system, in bytes.
    pub disk_total_bytes: u64,
    /// What of it is used.
    pub disk_used_bytes: u64,
}

/// One sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Sandbox {
    /// Its id.
    pub id: SandboxId,
    /// Where it is in its life.
    pub state: SandboxState,
    /// What it was made from.
    pub template: TemplateName,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
    /// Whether its memory is of huge pages.
    #[serde(default)]
    pub huge_pages: bool,
    /// Size of its disk in MiB, used or not.
    #[serde(default)]
    pub disk_mb: u64,
    /// The host-side address of its network.
    pub address: String,
    /// What it may reach.
    #[serde(default)]
    pub network: NetworkPolicy,
    /// How much it may do with its disk.
    #[serde(default, skip_serializing_if = "DiskLimits::is_empty")]
    pub disk_limits: DiskLimits,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// The newest build of its memory, once it was paused or restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<String>,
    /// How many diffs lie under that build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    /// Why it failed, or why the last operation on it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// As given at creation.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// When it last began to run, Unix milliseconds.
    #[serde(default)]
    pub started_at_ms: u64,
    /// When its time is up, Unix milliseconds; absent while it is paused, and for one that may run
    /// for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at_ms: Option<u64>,
    /// What a paused one has left, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_left_ms: Option<u64>,
    /// What becomes of it when its time is up.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Whether traffic for it brings it back while it is paused.
    #[serde(default)]
    pub auto_resume: bool,
    /// Changes whenever it begins to run; absent before that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<String>,
    /// What the guest's own daemon asks callers for, as header `X-Access-Token`. In the answers of
    /// create and get, not in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
}

/// `GET /v1/sandboxes/{id}/disk`: what its disk takes on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskStats {
    /// `device-mapper`, `reflink` or `copy`: how this host gives sandboxes disks of their own.
    pub backend: String,
    /// What the guest sees.
    pub size_bytes: u64,
    /// What is stored for it: with `device-mapper` what it has changed, else all of it that is no
    /// hole, blocks that `reflink` shares included.
    pub stored_bytes: u64,
    /// The most that `stored_bytes` may get to, where the host has set a bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes: Option<u64>,
    /// The bound was reached, and the guest's further writes fail.
    pub full: bool,
}

/// `GET /v1/sandboxes/{id}/memory`: what its memory did since it was last resumed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryStats {
    /// Pages of the guest.
    pub guest_pages: u64,
    /// Bytes of one page.
    pub page_bytes: u64,
    /// Pages installed since the resume; all of them for a guest that was booted.
    pub resident_pages: u64,
    /// Pages stored by the newest build of this sandbox; absent before its first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_pages: Option<u64>,
    /// Faults served. Zero for a guest that was booted.
    pub faults: u64,
    /// Median of a fault's service time, microseconds.
    pub fault_us_p50: f64,
    /// 99th percentile.
    pub fault_us_p99: f64,
    /// Longest.
    pub fault_us_max: f64,
    /// Pages installed ahead of faults because earlier resumes had touched them.
    #[serde(default)]
    pub replayed_pages: u64,
    /// About how many of those the guest has asked for.
    #[serde(default)]
    pub replay_hits: u64,
    /// Pages installed by loading all memory in the background.
    #[serde(default)]
    pub loaded_pages: u64,
}

/// `GET /v1/sandboxes/{id}/console`: a line of what its VMM and its guest's kernel print.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsoleLine {
    /// When it began to be printed, Unix milliseconds.
    pub at_ms: u64,
    /// The line.
    pub line: String,
}

/// A sandbox for tests.
#[cfg(test)]
pub(crate) fn example(id: &str, state: SandboxState) -> Sandbox {
    let json = serde_json::json!({
        "id": id, "state": state, "template": "base", "vcpus": 1, "memory_mb": 256,
        "address": "192.0.2.1", "created_at_ms": 5,
    });
    serde_json::from_value(json).expect("a sandbox")
}
