//! How much one sandbox may do with its disk.

use std::ops::RangeInclusive;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::ApiError;

/// What limits are taken: less is none, and no disk reaches more.
pub const DISK_LIMITS: RangeInclusive<u64> = 1..=1 << 30;

/// `PUT /v1/sandboxes/{id}/disk`, and `disk_limits` of a new sandbox. Reading and writing count
/// together; where a limit is absent, the host's own for all sandboxes holds, if it has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DiskLimits {
    /// How much it may read and write a second, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mib_per_s: Option<u64>,
    /// How often it may a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops_per_s: Option<u64>,
}

impl DiskLimits {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Refuses limits that make no sense; `prefix` is where in the body they are.
    pub(crate) fn check(&self, prefix: &str) -> Result<(), ApiError> {
        for (name, limit) in [("mib_per_s", self.mib_per_s), ("ops_per_s", self.ops_per_s)] {
            if let Some(limit) = limit.filter(|limit| !DISK_LIMITS.contains(limit)) {
                let (least, most) = (DISK_LIMITS.start(), DISK_LIMITS.end());
                return Err(ApiError::BadRequest {
                    field: format!("{prefix}{name}"),
                    detail: format!("is {limit}; {least} to {most} are possible"),
                });
            }
        }
        Ok(())
    }
}
