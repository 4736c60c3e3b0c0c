//! What Firecracker's API is sent, as types.
//!
//! Source: `src/firecracker/swagger/firecracker.yaml` of Firecracker 1.17; by its change log, all
//! members here but one are older than 1.13.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::vmm::rate_limiter::RateLimiter;

/// The answer to `GET /`, as far as it matters.
#[derive(Debug, Deserialize)]
pub(super) struct Instance {
    /// `Not started`, `Running` or `Paused`.
    pub(super) state: String,
}

/// `PUT /machine-config`.
#[derive(Debug, Serialize)]
pub(super) struct MachineConfig {
    pub(super) vcpu_count: u32,
    pub(super) mem_size_mib: u32,
    pub(super) smt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) huge_pages: Option<&'static str>,
}

/// `PUT /boot-source`.
#[derive(Debug, Serialize)]
pub(super) struct BootSource {
    pub(super) kernel_image_path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) initrd_path: Option<PathBuf>,
    pub(super) boot_args: String,
}

/// `PUT /drives/{drive_id}`.
#[derive(Debug, Serialize)]
pub(super) struct Drive {
    pub(super) drive_id: &'static str,
    pub(super) path_on_host: PathBuf,
    pub(super) is_root_device: bool,
    pub(super) is_read_only: bool,
    /// The guest's flushes reach the disk.
    pub(super) cache_type: &'static str,
    /// The other engine froze restored guests before 1.15.
    pub(super) io_engine: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rate_limiter: Option<RateLimiter>,
}

/// `PATCH /drives/{drive_id}`: other limits.
#[derive(Debug, Serialize)]
pub(super) struct PartialDrive {
    pub(super) drive_id: &'static str,
    pub(super) rate_limiter: RateLimiter,
}

/// `PUT /vsock`.
#[derive(Debug, Serialize)]
pub(super) struct Vsock {
    pub(super) guest_cid: u32,
    pub(super) uds_path: &'static str,
}

/// `PUT /network-interfaces/{iface_id}`.
#[derive(Debug, Serialize)]
pub(super) struct NetworkInterface {
    pub(super) iface_id: &'static str,
    pub(super) host_dev_name: &'static str,
    pub(super) guest_mac: &'static str,
}

/// `PUT /balloon`.
#[derive(Debug, Serialize)]
pub(super) struct Balloon {
    pub(super) amount_mib: u32,
    pub(super) deflate_on_oom: bool,
    /// From 1.14 on; older ones know no such member.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) free_page_reporting: bool,
}

/// `PUT /mmds/config`.
#[derive(Debug, Serialize)]
pub(super) struct MmdsConfig {
    pub(super) version: &'static str,
    pub(super) network_interfaces: [&'static str; 1],
}

/// `PUT /mmds`: what a guest may ask for.
#[derive(Debug, Serialize)]
pub(super) struct Metadata {
    pub(super) sandbox_id: String,
    pub(super) template_id: String,
}

/// `PUT /actions`.
#[derive(Debug, Serialize)]
pub(super) struct Action {
    pub(super) action_type: &'static str,
}

/// `PATCH /vm`.
#[derive(Debug, Serialize)]
pub(super) struct VmState {
    pub(super) state: &'static str,
}

/// `PUT /snapshot/create`.
#[derive(Debug, Serialize)]
pub(super) struct SnapshotCreate {
    pub(super) snapshot_type: &'static str,
    pub(super) snapshot_path: PathBuf,
    pub(super) mem_file_path: PathBuf,
}

/// `PUT /snapshot/load`.
#[derive(Debug, Serialize)]
pub(super) struct SnapshotLoad {
    pub(super) snapshot_path: PathBuf,
    pub(super) mem_backend: MemoryBackend,
    pub(super) resume_vm: bool,
    pub(super) network_overrides: Vec<NetworkOverride>,
}

/// Where the memory of a loaded guest comes from.
#[derive(Debug, Serialize)]
pub(super) struct MemoryBackend {
    pub(super) backend_type: &'static str,
    pub(super) backend_path: PathBuf,
}

/// The tap device of a loaded guest.
#[derive(Debug, Serialize)]
pub(super) struct NetworkOverride {
    pub(super) iface_id: &'static str,
    pub(super) host_dev_name: &'static str,
}
