//! Latencies in a histogram, and the percentiles that reports have.

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::Serialize;

/// Longer than a faulter can say in 32 bits of nanoseconds.
const LONGEST_NS: u64 = 5_000_000_000;

/// Latencies of one round, or of several added up.
#[derive(Clone, Debug)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    /// Three significant digits from a nanosecond to seconds.
    pub(crate) fn new() -> Self {
        Self(Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("constant bounds are valid"))
    }

    /// Those of one pass.
    pub(crate) fn of(latencies_ns: &[u32]) -> Self {
        let mut all = Self::new();
        for ns in latencies_ns {
            all.0.saturating_record(u64::from(*ns));
        }
        all
    }

    /// Adds another's.
    pub(crate) fn add(&mut self, other: &Self) -> Result<()> {
        Ok(self.0.add(&other.0)?)
    }

    pub(crate) fn percentiles(&self) -> Percentiles {
        let us = |quantile| self.0.value_at_quantile(quantile) as f64 / 1000.0;
        Percentiles {
            count: self.0.len(),
            p50: us(0.50),
            p90: us(0.90),
            p99: us(0.99),
            p99_9: us(0.999),
            max: self.0.max() as f64 / 1000.0,
        }
    }
}

/// In microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) count: u64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p99_9: f64,
    pub(crate) max: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_in_microseconds_and_of_all_rounds() {
        let mut all = Latencies::of(&[1_000; 99]);
        all.add(&Latencies::of(&[2_000_000])).unwrap();
        let found = all.percentiles();
        assert_eq!(found.count, 100);
        assert!((found.p50 - 1.0).abs() < 0.01, "{found:?}");
        assert!((found.p99 - 1.0).abs() < 0.01, "{found:?}");
        assert!((found.max - 2000.0).abs() < 2.0, "{found:?}");
    }
}
