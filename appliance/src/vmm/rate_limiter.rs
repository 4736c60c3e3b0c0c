//! Limits of a disk as VMMs want to be told them; Firecracker's and Cloud Hypervisor's are alike.
//!
//! Source: Firecracker `src/firecracker/swagger/firecracker.yaml` (1.17), Cloud Hypervisor
//! `vmm/src/api/openapi/cloud-hypervisor.yaml` (54).

use serde::Serialize;

use super::DiskLimits;

/// Limits of bytes and of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct RateLimiter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bandwidth: Option<TokenBucket>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ops: Option<TokenBucket>,
}

/// So much of something per time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct TokenBucket {
    pub(crate) size: u64,
    /// Milliseconds.
    pub(crate) refill_time: u64,
}

impl RateLimiter {
    /// `None` for no limits.
    pub(crate) fn of(limits: DiskLimits) -> Option<Self> {
        let per_second = |size| TokenBucket {
            size,
            refill_time: 1000,
        };
        (limits != DiskLimits::default()).then(|| Self {
            bandwidth: limits.bytes_per_s.map(per_second),
            ops: limits.ops_per_s.map(per_second),
        })
    }
}

impl RateLimiter {
    /// As a change of whatever limits there are: what isn't named there stays, and a bucket without
    /// a size is none.
    ///
    /// Source: `get_bucket_update` in Firecracker's `src/vmm/src/vmm_config/mod.rs`.
    pub(crate) fn instead(limits: DiskLimits) -> Self {
        const NONE: TokenBucket = TokenBucket {
            size: 0,
            refill_time: 0,
        };
        let limiter = Self::of(limits);
        let of = |bucket: fn(Self) -> Option<TokenBucket>| limiter.and_then(bucket).or(Some(NONE));
        Self {
            bandwidth: of(|limiter| limiter.bandwidth),
            ops: of(|limiter| limiter.ops),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_limited_is_not_said() {
        let limits = |bytes_per_s, ops_per_s| {
            let limits = DiskLimits {
                bytes_per_s,
                ops_per_s,
            };
            serde_json::to_string(&RateLimiter::of(limits)).unwrap()
        };
        assert_eq!(limits(None, None), "null");
        assert_eq!(
            limits(None, Some(70)),
            r#"{"ops":{"size":70,"refill_time":1000}}"#
        );
        assert_eq!(
            limits(Some(8), None),
            r#"{"bandwidth":{"size":8,"refill_time":1000}}"#
        );
        let ops = DiskLimits {
            bytes_per_s: None,
            ops_per_s: Some(70),
        };
        assert_eq!(
            serde_json::to_string(&RateLimiter::instead(ops)).unwrap(),
            r#"{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":70,"refill_time":1000}}"#
        );
    }
}
