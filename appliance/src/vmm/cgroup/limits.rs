//! What one VMM may take of its host, as the kernel is told: values only.
//!
//! Source: `Documentation/admin-guide/cgroup-v2.rst` of the kernel.

use super::Controller;
use crate::config::VmmConfig;
use crate::vmm::GuestShape;

/// Of `cpu.max`, in microseconds; the kernel's own.
const PERIOD_US: u64 = 100_000;
/// `cpu.weight` has no more.
const MAX_WEIGHT: u64 = 10_000;

/// The limits of one VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    memory_bytes: u64,
    cpu_weight: u64,
    /// Microseconds of CPU time per period.
    cpu_quota_us: Option<u64>,
    pids: u64,
}

impl Limits {
    /// For a guest of this shape. `overhead_mb` is what a VMM of its kind takes besides the guest's
    /// memory, unless the configuration says otherwise.
    #[must_use]
    pub fn of(config: &VmmConfig, shape: &GuestShape, overhead_mb: u64) -> Self {
        let (guest, vcpus) = (shape.memory_bytes(), u64::from(shape.vcpus));
        // The kernel's tables for its memory grow with it, and count.
        let overhead = (config.memory_overhead_mb.unwrap_or(overhead_mb) << 20) + guest / 64;
        let percent = config.cpu_max_percent;
        Self {
            memory_bytes: guest + overhead,
            cpu_weight: (u64::from(config.cpu_weight) * vcpus).clamp(1, MAX_WEIGHT),
            cpu_quota_us: percent.map(|percent| vcpus * u64::from(percent) * PERIOD_US / 100),
            pids: u64::from(config.pids_max) + vcpus,
        }
    }

    /// The same with so much more memory.
    #[must_use]
    pub fn with_more_memory(mut self, bytes: u64) -> Self {
        self.memory_bytes += bytes;
        self
    }

    /// What is to be written, into which file.
    pub(super) fn settings(&self) -> Vec<(Controller, &'static str, String)> {
        let quota = self
            .cpu_quota_us
            .map_or_else(|| "max".to_owned(), |quota| quota.to_string());
        vec![
            (
                Controller::Memory,
                "memory.max",
                self.memory_bytes.to_string(),
            ),
            // All of a VMM or nothing: half of one helps nobody.
            (Controller::Memory, "memory.oom.group", "1".to_owned()),
            (Controller::Cpu, "cpu.weight", self.cpu_weight.to_string()),
            (Controller::Cpu, "cpu.max", format!("{quota} {PERIOD_US}")),
            (Controller::Pids, "pids.max", self.pids.to_string()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(config: &VmmConfig, vcpus: u32) -> String {
        let shape = GuestShape {
            vcpus,
            memory_mb: 512,
            huge_pages: false,
            kernel: "/k".into(),
            initrd: "/i".into(),
            cmdline: String::new(),
        };
        let limits = Limits::of(config, &shape, 128);
        let lines = limits.settings();
        let lines = lines
            .iter()
            .map(|(_, file, value)| format!("{file}={value}"));
        lines.collect::<Vec<_>>().join(";")
    }

    #[test]
    fn a_guest_gets_its_memory_and_its_vmms_own() {
        let config = VmmConfig::default();
        assert_eq!(
            settings(&config, 2),
            "memory.max=679477248;memory.oom.group=1;cpu.weight=200;cpu.max=max 100000;pids.max=514"
        );
    }

    #[test]
    fn the_configuration_says_otherwise() {
        let config = VmmConfig {
            memory_overhead_mb: Some(0),
            cpu_max_percent: Some(50),
            cpu_weight: 5000,
            pids_max: 32,
            ..VmmConfig::default()
        };
        assert_eq!(
            settings(&config, 3),
            "memory.max=545259520;memory.oom.group=1;cpu.weight=10000;cpu.max=150000 100000;pids.max=35"
        );
    }
}
