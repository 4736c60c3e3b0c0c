//! Snapshots and the templates they become, on the wire.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::{SandboxId, TemplateName};

/// What a template starts a sandbox from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// A disk: its sandboxes boot.
    Disk,
    /// Memory and a disk: its sandboxes are restored, running.
    Memory,
}

/// `POST /v1/snapshots`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// The sandbox to take it of, running or paused; it goes on as it was.
    pub sandbox: SandboxId,
    /// The template's name; chosen by the host when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<TemplateName>,
    /// Only if the sandbox's newest run is this one; a 412 else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<String>,
}

/// One template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Snapshot {
    /// The name sandboxes are created from.
    pub name: TemplateName,
    /// Whether its sandboxes boot or are restored.
    pub kind: SnapshotKind,
    /// The build it points at; absent for a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<String>,
    /// How many diffs lie under that build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    /// Virtual CPUs: baked in for memory, a default for a disk.
    pub vcpus: u32,
    /// Memory in MiB, likewise.
    pub memory_mb: u32,
    /// Whether memory is of huge pages, likewise.
    #[serde(default)]
    pub huge_pages: bool,
    /// Size of the disk in MiB, used or not.
    #[serde(default)]
    pub disk_mb: u64,
    /// The sandbox that it was taken of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<SandboxId>,
    /// Pages stored by that build itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_pages: Option<u64>,
    /// Unix milliseconds.
    pub created_at_ms: u64,
}
