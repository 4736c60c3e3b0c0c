//! The host on the wire.

use serde::{Deserialize, Serialize};

/// The VMM that this host drives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmInfo {
    /// `qemu`, later others.
    pub name: String,
    /// As it reports itself.
    pub version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why these were chosen.
    pub reason: String,
}

/// `GET /v1/host`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Version of the daemon.
    pub version: String,
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
}
