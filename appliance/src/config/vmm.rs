//! `[vmm]`: which VMMs there are, and which one new guests get.

use std::path::PathBuf;

use serde::Deserialize;

use super::Wrong;

/// What executes guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AcceleratorChoice {
    /// KVM if a probe guest runs on it, else emulation.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation.
    Tcg,
}

/// Which VMM new guests get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverChoice {
    /// Firecracker if it is installed and the guests' kernel gets up in it, else Cloud Hypervisor
    /// if the same is true of it, else QEMU.
    #[default]
    Auto,
    /// QEMU.
    Qemu,
    /// Firecracker, without asking whether a stock kernel gets up in it.
    Firecracker,
    /// Cloud Hypervisor, in the same way.
    CloudHypervisor,
}

/// `[vmm]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmmConfig {
    /// Which VMM new guests get.
    pub driver: DriverChoice,
    /// Firecrackers: the first for new guests, the others for builds that they made.
    pub firecracker: Vec<PathBuf>,
    /// Firecracker's jailer. Without one, Firecracker runs as the daemon's user.
    pub jailer: Option<PathBuf>,
    /// Whether Cloud Hypervisors and QEMUs run as users of their own, where the daemon is root.
    pub own_users: bool,
    /// The user and group of the first slot's VMM, jailed or of a user of its own; each slot has
    /// others.
    pub jail_user: u32,
    /// VMMs that wait, started, in slots that wait for new sandboxes, and as many in those that
    /// paused ones gave back; as many as slots wait when absent.
    pub ready_processes: Option<usize>,
    /// Whether Firecracker's guests that are booted get a vsock device; it stays with what is made
    /// of them.
    pub vsock: bool,
    /// Whether VMMs are limited by control groups, where the host has them (version 2).
    pub cgroups: bool,
    /// What a VMM may take besides its guest's memory; by its kind when absent.
    pub memory_overhead_mb: Option<u64>,
    /// A sandbox's share of a busy host's processors, per vCPU.
    pub cpu_weight: u32,
    /// How much of one processor a sandbox may take per vCPU, in percent; no limit when absent.
    pub cpu_max_percent: Option<u32>,
    /// Processes and threads that a VMM may have besides its vCPUs.
    pub pids_max: u32,
    /// Cloud Hypervisors: the first for new guests, the others for builds that they made.
    pub cloud_hypervisor: Vec<PathBuf>,
    /// How long a Firecracker or a Cloud Hypervisor may take for one command.
    pub command_timeout_s: u64,
    /// The QEMU program.
    pub qemu: PathBuf,
    /// The preload library; beside the `thaw` program when absent.
    pub preload: Option<PathBuf>,
    /// What executes guests.
    pub accelerator: AcceleratorChoice,
    /// How long a guest may take from its start to its first answer.
    pub boot_timeout_s: u64,
}

impl Default for VmmConfig {
    fn default() -> Self {
        Self {
            driver: DriverChoice::Auto,
            firecracker: vec!["firecracker".into()],
            jailer: None,
            own_users: true,
            jail_user: 200_000,
            ready_processes: None,
            vsock: false,
            cgroups: true,
            memory_overhead_mb: None,
            cpu_weight: 100,
            cpu_max_percent: None,
            pids_max: 512,
            cloud_hypervisor: vec!["cloud-hypervisor".into()],
            command_timeout_s: crate::vmm::COMMAND_TIMEOUT.as_secs(),
            qemu: "qemu-system-x86_64".into(),
            preload: None,
            accelerator: AcceleratorChoice::Auto,
            boot_timeout_s: 60,
        }
    }
}

impl VmmConfig {
    pub(super) fn check(&self) -> Result<(), Wrong> {
        if self.firecracker.is_empty() {
            let problem = "is empty; name the program, or set vmm.driver to \"qemu\"".to_owned();
            return Err(("vmm.firecracker".into(), problem));
        }
        if self.cloud_hypervisor.is_empty() {
            let problem = "is empty; name the program, or set vmm.driver to \"qemu\"".to_owned();
            return Err(("vmm.cloud_hypervisor".into(), problem));
        }
        if !(1..=3600).contains(&self.command_timeout_s) {
            let problem = format!("is {}; 1 to 3600 are possible", self.command_timeout_s);
            return Err(("vmm.command_timeout_s".into(), problem));
        }
        let ranges = [
            (
                "vmm.ready_processes",
                self.ready_processes.map(|n| n as u64),
                0..=4096,
            ),
            (
                "vmm.memory_overhead_mb",
                self.memory_overhead_mb,
                0..=1 << 20,
            ),
            ("vmm.cpu_weight", Some(self.cpu_weight.into()), 1..=10_000),
            (
                "vmm.cpu_max_percent",
                self.cpu_max_percent.map(u64::from),
                1..=100_000,
            ),
            ("vmm.pids_max", Some(self.pids_max.into()), 16..=1 << 20),
        ];
        for (key, value, range) in ranges {
            if let Some(value) = value.filter(|value| !range.contains(value)) {
                let problem = format!(
                    "is {value}; {} to {} are possible",
                    range.start(),
                    range.end()
                );
                return Err((key.into(), problem));
            }
        }
        // Every slot's VMM has a number of its own from there on.
        let last = u32::MAX - (1 << 24);
        if !(1..=last).contains(&self.jail_user) {
            let problem = format!("is {}; 1 to {last} are possible", self.jail_user);
            return Err(("vmm.jail_user".into(), problem));
        }
        Ok(())
    }
}
