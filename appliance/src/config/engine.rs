//! `[engine]`: how faults are served, and what is done ahead of them.

use serde::Deserialize;

use super::Wrong;

/// `[engine]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Pages installed around a fault whose content is at hand: 1, 2, 4, … 64.
    pub window_pages: u64,
    /// Page reads in flight per worker.
    pub read_slots: usize,
    /// How long a worker asks for the next fault before it waits in the kernel, microseconds; 0
    /// is not at all. Measured at start when absent.
    pub spin_us: Option<u64>,
    /// Whether the vCPU of a guest with one is pinned to its worker's core.
    pub pin_vcpus: bool,
    /// Whether what restores touch first is recorded, and replayed at later ones.
    pub working_sets: bool,
    /// How long after a guest's first fault it is recorded, milliseconds.
    pub record_ms: u64,
    /// How fast the whole memory of a resumed guest is loaded behind its faults, MiB a second; 0
    /// is not at all.
    pub load_mib_per_s: u64,
    /// Whether the kernel remembers which pages a guest writes, so that a pause reads only those.
    pub track_writes: bool,
    /// Whether a pause reads the others as well, and refuses if one was written.
    pub check_writes: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        let worker = uffd_engine::WorkerOptions::default();
        Self {
            window_pages: worker.window_pages,
            read_slots: worker.read_slots,
            spin_us: None,
            pin_vcpus: false,
            working_sets: true,
            record_ms: 2000,
            load_mib_per_s: 0,
            track_writes: true,
            check_writes: false,
        }
    }
}

impl EngineConfig {
    pub(super) fn check(&self) -> Result<(), Wrong> {
        let window = self.window_pages;
        if !window.is_power_of_two() || window > 64 {
            let problem = format!("is {window}; a power of two up to 64 is possible");
            return Err(("engine.window_pages".into(), problem));
        }
        if !(1..=4096).contains(&self.read_slots) {
            let problem = format!("is {}; 1 to 4096 are possible", self.read_slots);
            return Err(("engine.read_slots".into(), problem));
        }
        if let Some(us) = self.spin_us.filter(|us| *us > 1000) {
            let problem = format!("is {us}; 0 to 1000 are possible");
            return Err(("engine.spin_us".into(), problem));
        }
        if !(1..=60_000).contains(&self.record_ms) {
            let problem = format!("is {}; 1 to 60000 are possible", self.record_ms);
            return Err(("engine.record_ms".into(), problem));
        }
        if self.check_writes && !self.track_writes {
            let problem = "has nothing to check without engine.track_writes".to_owned();
            return Err(("engine.check_writes".into(), problem));
        }
        Ok(())
    }
}
