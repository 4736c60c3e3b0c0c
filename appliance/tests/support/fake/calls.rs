//! What each VMM is told when, and what its guests find out about themselves.

use serde_json::{Value, json};

use super::Vmm;

impl Vmm {
    /// Calls of a boot.
    pub(crate) const fn boot_calls(self) -> &'static [&'static str] {
        match self {
            Self::Firecracker => &[
                "PUT /machine-config",
                "PUT /boot-source",
                "PUT /drives/rootfs",
                "PUT /network-interfaces/eth0",
                "PUT /balloon",
                "PUT /mmds/config",
                "PUT /mmds",
                "PUT /actions",
            ],
            Self::CloudHypervisor => &["vm.create", "vm.boot"],
        }
    }

    /// Calls of a resume, and what is said in between.
    pub(crate) const fn restore_calls(self) -> &'static [&'static str] {
        match self {
            Self::Firecracker => &["PUT /mmds", "PUT /snapshot/load", "PATCH /drives/rootfs"],
            Self::CloudHypervisor => &[
                "vm.receive-migration",
                "receive Start",
                "receive MemoryFd",
                "receive Config",
                "receive State",
                "receive Complete",
            ],
        }
    }

    /// Calls of a pause, after the guest has stopped.
    pub(crate) const fn save_calls(self) -> &'static [&'static str] {
        match self {
            Self::Firecracker => &["PUT /snapshot/create"],
            Self::CloudHypervisor => &[
                "vm.send-migration",
                "send Start",
                "send MemoryFd",
                "send Config",
                "send State",
                "send CompletePaused",
            ],
        }
    }

    /// The call that stops a guest.
    pub(crate) const fn stop_call(self) -> &'static str {
        match self {
            Self::Firecracker => "PATCH /vm Paused",
            Self::CloudHypervisor => "vm.pause",
        }
    }

    /// What a guest finds out about itself.
    pub(crate) fn known_of(self, id: &str, template: &str) -> Value {
        match self {
            Self::Firecracker => json!({ "sandbox_id": id, "template_id": template }),
            // It has no way to.
            Self::CloudHypervisor => Value::Null,
        }
    }
}
