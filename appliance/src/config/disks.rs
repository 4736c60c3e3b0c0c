//! `[disks]`: how sandboxes get disks.

use serde::Deserialize;

use super::Wrong;

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
}

impl DisksConfig {
    pub(super) fn check(&self) -> Result<(), Wrong> {
        if self.cow_mb == Some(0) {
            return Err(("disks.cow_mb".into(), "is 0; at least 1 is needed".into()));
        }
        Ok(())
    }
}
