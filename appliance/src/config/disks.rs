//! `[disks]`: how sandboxes get disks.

use serde::Deserialize;

use super::Wrong;
use crate::vmm::DiskLimits;

/// How sandboxes get disks of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBackend {
    /// The first of these that works in the data directory.
    #[default]
    Auto,
    /// Snapshots over a shared image.
    DeviceMapper,
    /// Files that share blocks.
    Reflink,
    /// Copies that skip holes.
    Copy,
}

/// `[disks]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DisksConfig {
    /// How sandboxes get disks of their own.
    pub backend: DiskBackend,
    /// With device-mapper: how much of its disk one guest may change, in MiB, with a little that
    /// the bookkeeping takes; all of it when absent.
    pub cow_mb: Option<u64>,
    /// How much one guest may read and write a second, in MiB; no limit when absent.
    pub mib_per_s: Option<u64>,
    /// How often it may; no limit when absent.
    pub ops_per_s: Option<u64>,
}

impl DisksConfig {
    pub(super) fn check(&self) -> Result<(), Wrong> {
        if self.cow_mb == Some(0) {
            return Err(("disks.cow_mb".into(), "is 0; at least 1 is needed".into()));
        }
        for (key, value) in [
            ("disks.mib_per_s", self.mib_per_s),
            ("disks.ops_per_s", self.ops_per_s),
        ] {
            if value.is_some_and(|value| !(1..=1 << 30).contains(&value)) {
                let problem = "is no limit; 1 to 1073741824 are possible".to_owned();
                return Err((key.into(), problem));
            }
        }
        Ok(())
    }

    /// What VMMs are told of it.
    #[must_use]
    pub fn limits(&self) -> DiskLimits {
        DiskLimits {
            bytes_per_s: self.mib_per_s.map(|mib| mib << 20),
            ops_per_s: self.ops_per_s,
        }
    }
}
