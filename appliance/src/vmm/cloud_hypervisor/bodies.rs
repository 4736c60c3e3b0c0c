//! What Cloud Hypervisor's API is sent and says, as types.
//!
//! Source: `vmm/src/api/openapi/cloud-hypervisor.yaml` of Cloud Hypervisor 53. Members that a
//! version doesn't know are passed over by it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::vmm::rate_limiter::RateLimiter;

/// `PUT vm.create`.
#[derive(Debug, Serialize)]
pub(super) struct VmConfig {
    pub(super) cpus: Cpus,
    pub(super) memory: Memory,
    pub(super) payload: Payload,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) disks: Vec<Disk>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) net: Vec<Net>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) balloon: Option<Balloon>,
    pub(super) serial: Console,
    pub(super) console: Console,
    /// A guest that panics can say so.
    pub(super) pvpanic: bool,
    pub(super) landlock_enable: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) landlock_rules: Vec<LandlockRule>,
}

#[derive(Debug, Serialize)]
pub(super) struct Cpus {
    pub(super) boot_vcpus: u32,
    pub(super) max_vcpus: u32,
    /// A guest has no guests of its own.
    pub(super) nested: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Memory {
    pub(super) size: u64,
    /// In a memfd, which can be handed over.
    pub(super) shared: bool,
    pub(super) hugepages: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) hugepage_size: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Payload {
    pub(super) kernel: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) initramfs: Option<PathBuf>,
    pub(super) cmdline: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) readonly: bool,
    /// Else it would be looked for in what the guest writes.
    pub(super) image_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rate_limiter_config: Option<RateLimiter>,
}

#[derive(Debug, Serialize)]
pub(super) struct Net {
    pub(super) tap: &'static str,
    pub(super) mac: &'static str,
}

#[derive(Debug, Serialize)]
pub(super) struct Balloon {
    pub(super) size: u64,
    pub(super) deflate_on_oom: bool,
    pub(super) free_page_reporting: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Console {
    pub(super) mode: &'static str,
}

/// A path that the VMM may go on using.
#[derive(Clone, Debug, Serialize)]
pub(super) struct LandlockRule {
    pub(super) path: PathBuf,
    pub(super) access: &'static str,
}

/// `PUT vm.send-migration`.
#[derive(Debug, Serialize)]
pub(super) struct SendMigration {
    pub(super) destination_url: String,
    pub(super) local: bool,
    /// From version 54 on; older ones know no such member.
    pub(super) preserve_source: bool,
}

/// `PUT vm.receive-migration`.
#[derive(Debug, Serialize)]
pub(super) struct ReceiveMigration {
    pub(super) receiver_url: String,
    pub(super) memory_mode: &'static str,
}

/// `PUT vm.restore`.
#[derive(Debug, Serialize)]
pub(super) struct RestoreVm {
    pub(super) source_url: String,
    pub(super) memory_restore_mode: FromFile,
}

/// When a guest's memory comes out of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum FromFile {
    /// All of it before the guest goes on.
    ///
    /// Source: `uffd_handler_loop` in `vmm/src/memory_manager.rs` of Cloud Hypervisor 52, which
    /// brings in on demand nothing that isn't asked for, lets a guest be saved without the rest,
    /// and stops when it has brought in as many pages as there are, even if a balloon gave some
    /// back and they came twice.
    #[serde(rename = "Copy")]
    Before,
    /// Behind it, and what it asks for at once.
    OnDemand,
}

/// What `GET vm.info` says, as far as it matters.
#[derive(Debug, Deserialize)]
pub(super) struct VmInfo {
    pub(super) state: String,
}
