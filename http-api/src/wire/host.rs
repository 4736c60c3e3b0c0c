//! The host on the wire.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::SandboxState;
use crate::ids::SandboxId;

/// The VMM that this host drives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmmInfo {
    /// `firecracker` or `qemu`.
    pub name: String,
    /// As it reports itself.
    pub version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why these were chosen.
    pub reason: String,
}

/// Whether a scheduler should send work here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HostStatus {
    /// Yes.
    Ready,
    /// No: what runs is being paused, or was.
    Draining,
}

/// The processors, as the kernel says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CpuInfo {
    /// The model's name.
    pub model: String,
    /// Hardware threads that are online.
    pub threads: u32,
    /// What it can: a guest's memory is good only where all of these are that it was told of.
    pub flags: Vec<String>,
}

/// One NUMA node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NumaNode {
    /// The kernel's number.
    pub node: u32,
    /// Its hardware threads.
    pub cpus: Vec<usize>,
}

/// Pages of one size that are set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Hugepages {
    /// Of one, in KiB.
    pub page_kib: u64,
    /// How many there are.
    pub total: u64,
    /// How many nobody has.
    pub free: u64,
}

/// What there is, and what is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Capacity {
    /// Memory of the host, in MiB.
    pub memory_total_mb: u64,
    /// What of it could be had now, as the kernel estimates.
    pub memory_available_mb: u64,
    /// Memory that running sandboxes may come to use.
    pub memory_allocated_mb: u64,
    /// Virtual CPUs of running sandboxes.
    pub vcpus_allocated: u64,
    /// The file system of builds and disks, in MiB.
    pub disk_total_mb: u64,
    /// What of it is free.
    pub disk_available_mb: u64,
    /// Network slots: each sandbox has one.
    pub slots_total: u64,
    /// Slots of sandboxes, in any state.
    pub slots_used: u64,
}

/// `GET /v1/host`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HostInfo {
    /// Version of the daemon.
    pub version: String,
    /// Whether it takes work.
    pub status: HostStatus,
    /// The kernel's release.
    pub kernel: String,
    /// Which VMM, and why.
    pub vmm: VmmInfo,
    /// How disks are copied, and why.
    pub disks: String,
    /// Threads that own sandboxes.
    pub shards: usize,
    /// Fault-serving processes.
    pub engines: usize,
    /// How their workers wait for faults, and why.
    pub workers: String,
    /// Sandboxes in any state.
    pub sandboxes: usize,
    /// Sandboxes by state.
    pub states: BTreeMap<String, usize>,
    /// Templates, with memory or without.
    pub templates: usize,
    /// The processors.
    pub cpu: CpuInfo,
    /// NUMA nodes.
    pub nodes: Vec<NumaNode>,
    /// Huge pages, by size.
    pub hugepages: Vec<Hugepages>,
    /// What there is, and what is taken.
    pub capacity: Capacity,
}

/// `POST /v1/host/drain`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Drained {
    /// Sandboxes that are paused now.
    pub paused: Vec<SandboxId>,
    /// Those that are not, and could not be.
    pub left: Vec<Left>,
}

/// A sandbox that was not paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Left {
    /// Which.
    pub id: SandboxId,
    /// What it is instead.
    pub state: SandboxState,
    /// Why, as far as is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `POST /v1/host/reconcile`: what was left over, and what became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reconciled {
    /// Sandboxes there are, each with what it should have.
    pub sandboxes: usize,
    /// What belonged to nobody.
    pub found: Vec<Finding>,
}

/// One thing that belonged to nobody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Finding {
    /// What it is.
    pub kind: FindingKind,
    /// Which.
    pub name: String,
    /// Whether it is gone now.
    pub removed: bool,
    /// Why not, if not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What can be left over.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// A sandbox in the catalogue that no thread of the daemon knows.
    Row,
    /// The directory of a sandbox that there isn't.
    Directory,
    /// Block devices of the disk of a sandbox that there isn't.
    Disk,
    /// A network slot, with the processes in it, of no sandbox.
    Slot,
    /// A build that nothing needs.
    Build,
}
