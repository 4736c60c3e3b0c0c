//! A guest from its kernel: what it is told to be.

use std::path::Path;

use super::{DISK, FirecrackerMachine, LINK};
use crate::network::address::{GATEWAY, GUEST, GUEST_MAC, GUEST_PREFIX, TAP};
use crate::vmm::firecracker::Options;
use crate::vmm::firecracker::bodies::{
    Action, Balloon, BootSource, Drive, MachineConfig, Metadata, MmdsConfig, NetworkInterface,
    Vsock,
};
use crate::vmm::firecracker::command::VSOCK_PATH;
use crate::vmm::launch::DISK_PATH;
use crate::vmm::rate_limiter::RateLimiter;
use crate::vmm::{GuestShape, Place, VmmError};

/// Source: vsock(7).
const FIRST_CID: u32 = 3;

impl FirecrackerMachine {
    /// A guest from its kernel. Without a place it has neither disk nor network.
    pub(in crate::vmm::firecracker) async fn boot(
        &mut self,
        shape: &GuestShape,
        kernel: &Path,
        place: Option<(&Place, Options)>,
        free_page_reporting: bool,
    ) -> Result<(), VmmError> {
        let machine = MachineConfig {
            vcpu_count: shape.vcpus,
            mem_size_mib: shape.memory_mb,
            smt: false,
            huge_pages: shape.huge_pages.then_some("2M"),
        };
        self.put("/machine-config", &machine).await?;
        let network = place
            .map(|_| format!(" thaw.ip={GUEST}/{GUEST_PREFIX} thaw.gw={GATEWAY}"))
            .unwrap_or_default();
        let cmdline = &shape.cmdline;
        let boot = BootSource {
            kernel_image_path: self.layout.kernel(kernel).to_owned(),
            initrd_path: place.map(|_| self.layout.initrd(&shape.initrd).to_owned()),
            boot_args: format!("console=ttyS0 reboot=k panic=-1{network} {cmdline}"),
        };
        self.put("/boot-source", &boot).await?;
        if let Some((place, options)) = place {
            self.add_devices(place, options, free_page_reporting)
                .await?;
        }
        let start = Action {
            action_type: "InstanceStart",
        };
        self.put("/actions", &start).await
    }

    async fn add_devices(
        &mut self,
        place: &Place,
        options: Options,
        free_page_reporting: bool,
    ) -> Result<(), VmmError> {
        let drive = Drive {
            drive_id: DISK,
            path_on_host: DISK_PATH.into(),
            // The initial RAM disk mounts it.
            is_root_device: false,
            is_read_only: false,
            cache_type: "Writeback",
            io_engine: "Sync",
            rate_limiter: RateLimiter::of(place.disk_limits),
        };
        self.put(&format!("/drives/{DISK}"), &drive).await?;
        let link = NetworkInterface {
            iface_id: LINK,
            host_dev_name: TAP,
            guest_mac: GUEST_MAC,
        };
        self.put(&format!("/network-interfaces/{LINK}"), &link)
            .await?;
        let balloon = Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            free_page_reporting,
        };
        self.put("/balloon", &balloon).await?;
        if options.vsock {
            let vsock = Vsock {
                // Those of others don't matter to it; below are those that mean something.
                guest_cid: place.slot.saturating_add(FIRST_CID),
                uds_path: VSOCK_PATH,
            };
            self.put("/vsock", &vsock).await?;
        }
        let config = MmdsConfig {
            version: "V2",
            network_interfaces: [LINK],
        };
        self.put("/mmds/config", &config).await?;
        self.introduce(place).await
    }

    /// What the guest may ask for; a device state doesn't hold it.
    pub(super) async fn introduce(&mut self, place: &Place) -> Result<(), VmmError> {
        let metadata = Metadata {
            sandbox_id: place.name.clone(),
            template_id: place.template.clone(),
        };
        self.put("/mmds", &metadata).await
    }
}
