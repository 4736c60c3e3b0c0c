//! A guest from its kernel: what it is told to be.

use std::path::Path;

use super::CloudHypervisorMachine;
use crate::network::address::{GATEWAY, GUEST, GUEST_MAC, GUEST_PREFIX, TAP};
use crate::vmm::cloud_hypervisor::bodies::{
    Balloon, Console, Cpus, Disk, LandlockRule, Memory, Net, Payload, VmConfig,
};
use crate::vmm::launch::{DISK_PATH, INITRD_PATH, KERNEL_PATH};
use crate::vmm::own_user::USERFAULTFD;
use crate::vmm::rate_limiter::RateLimiter;
use crate::vmm::{GuestShape, Place, VmmError};

impl CloudHypervisorMachine {
    /// A guest from its kernel, running. Without a place it has neither disk nor network.
    pub(in crate::vmm::cloud_hypervisor) async fn boot(
        &mut self,
        shape: &GuestShape,
        place: Option<&Place>,
        landlock: bool,
    ) -> Result<(), VmmError> {
        let network = place
            .map(|_| format!(" thaw.ip={GUEST}/{GUEST_PREFIX} thaw.gw={GATEWAY}"))
            .unwrap_or_default();
        let config = VmConfig {
            cpus: Cpus {
                boot_vcpus: shape.vcpus,
                max_vcpus: shape.vcpus,
                nested: false,
            },
            memory: Memory {
                size: shape.memory_bytes(),
                shared: true,
                hugepages: self.memory.is_huge(),
                hugepage_size: self.memory.is_huge().then(|| self.memory.page_size.bytes()),
            },
            payload: Payload {
                kernel: KERNEL_PATH.into(),
                initramfs: place.map(|_| INITRD_PATH.into()),
                cmdline: format!("console=ttyS0 panic=-1{network} {}", shape.cmdline),
            },
            disks: place
                .map(|_| Disk {
                    path: DISK_PATH.into(),
                    readonly: false,
                    image_type: "Raw",
                    rate_limiter_config: RateLimiter::of(self.disk_limits),
                })
                .into_iter()
                .collect(),
            net: place
                .map(|_| Net {
                    tap: TAP,
                    mac: GUEST_MAC,
                })
                .into_iter()
                .collect(),
            balloon: place.map(|_| Balloon {
                size: 0,
                deflate_on_oom: true,
                free_page_reporting: true,
            }),
            serial: Console { mode: "Tty" },
            console: Console { mode: "Off" },
            pvpanic: true,
            landlock_enable: landlock,
            landlock_rules: if landlock {
                landlock_rules()
            } else {
                Vec::new()
            },
        };
        self.put("vm.create", &config).await?;
        self.order("vm.boot").await
    }
}

/// What it looks up about its tap device, and how it gets a userfaultfd without privilege; a path that
/// is not there would be refused.
pub(super) fn landlock_rules() -> Vec<LandlockRule> {
    let rules = [("/sys/class/net", "r"), (USERFAULTFD, "rw")];
    let there = rules
        .into_iter()
        .filter(|(path, _)| Path::new(path).exists());
    let rule = |(path, access): (&str, _)| LandlockRule {
        path: path.into(),
        access,
    };
    there.map(rule).collect()
}
