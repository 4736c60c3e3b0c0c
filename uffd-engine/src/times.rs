//! Times in few buckets: what a daemon can add up over sessions, and show to Prometheus.

use serde::{Deserialize, Serialize};

/// How many times were how long, and all of them together. Nothing is allocated for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// One for each of [`Times::BOUNDS_NS`], and one for what is longer.
    counts: [u64; 19],
    sum_ns: u64,
}

impl Times {
    /// Upper ends of buckets, in nanoseconds: from 1 µs to 131 ms, doubling.
    pub const BOUNDS_NS: [u64; 18] = {
        let mut bounds = [1000; 18];
        let mut n = 1;
        while n < bounds.len() {
            bounds[n] = 2 * bounds[n - 1];
            n += 1;
        }
        bounds
    };

    /// Writes down that `n` times were this long.
    pub fn record_n(&mut self, ns: u64, n: u64) {
        let bucket = Self::BOUNDS_NS.partition_point(|bound| *bound < ns);
        self.counts[bucket] += n;
        self.sum_ns = self.sum_ns.saturating_add(ns.saturating_mul(n));
    }

    /// Adds another's.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
    }

    /// The number in each bucket, and of what is longer than all of them.
    #[must_use]
    pub const fn counts(&self) -> [u64; 19] {
        self.counts
    }

    /// All of them together, in nanoseconds.
    #[must_use]
    pub const fn sum_ns(&self) -> u64 {
        self.sum_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_is_in_the_bucket_that_ends_at_or_after_it() {
        let mut times = Times::default();
        times.record_n(1000, 2);
        times.record_n(1001, 3);
        times.record_n(u64::MAX, 1);
        let counts = times.counts();
        assert_eq!((counts[0], counts[1], counts[18]), (2, 3, 1));
        assert_eq!(counts.iter().sum::<u64>(), 6);
        let mut sum = Times::default();
        sum.add(&times);
        sum.add(&Times::default());
        assert_eq!(sum.counts(), counts);
    }

    #[test]
    fn bounds_double_up_to_an_eighth_of_a_second() {
        assert_eq!(Times::BOUNDS_NS[17], 131_072_000);
    }
}
