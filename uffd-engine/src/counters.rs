//! What a session did: plain counters and one histogram, written by its worker only.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::replay::ReplayTally;
use crate::times::Times;

/// Longest service time the histogram tells apart, in nanoseconds (10 s).
const LONGEST_NS: u64 = 10_000_000_000;

/// Of how many turns one is timed.
const TIMED_TURNS: u64 = 8;

/// Counters of one session.
#[derive(Clone, Debug)]
pub struct Counters {
    /// Fault events read.
    pub faults: u64,
    /// Pages installed by copying from the page cache.
    pub pages_copied: u64,
    /// Pages installed after a read from disk.
    pub pages_read: u64,
    /// Zero pages installed.
    pub pages_zeroed: u64,
    /// Faults that found their page installed already.
    pub already_present: u64,
    /// Installs refused with `EAGAIN` and tried again.
    pub retries: u64,
    /// `REMOVE` events.
    pub removes: u64,
    /// Pages made to fail because their content could not be read.
    pub poisoned: u64,
    /// Pages that were loaded in the background.
    pub pages_loaded: u64,
    /// How often it moved to another worker.
    pub moves: u64,
    replayed: ReplayTally,
    /// Turns that answered a fault.
    turns: u64,
    service: Histogram<u32>,
    service_times: Times,
    turn_times: Times,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            faults: 0,
            pages_copied: 0,
            pages_read: 0,
            pages_zeroed: 0,
            already_present: 0,
            retries: 0,
            removes: 0,
            poisoned: 0,
            pages_loaded: 0,
            moves: 0,
            replayed: ReplayTally::default(),
            turns: 0,
            service: Histogram::new_with_bounds(1, LONGEST_NS, 2)
                .expect("constant bounds are valid"),
            service_times: Times::default(),
            turn_times: Times::default(),
        }
    }
}

impl Counters {
    /// Keeps what a replay did.
    pub(crate) fn keep_replay(&mut self, tally: ReplayTally) {
        self.replayed = tally;
    }

    /// Records the faults that were answered in the turn that read them, at `since`. One
    /// turn in eight is timed: looking at the clock again and keeping the result
    /// costs every fault 1 % otherwise.
    pub(crate) fn end_turn(&mut self, since: Instant, answered: &mut u64) {
        let answered = std::mem::take(answered);
        if answered > 0 {
            if self.turns.is_multiple_of(TIMED_TURNS) {
                let took = since.elapsed();
                self.record_services(took, answered);
                self.turn_times.record_n(nanoseconds(took), 1);
            }
            self.turns += 1;
        }
    }

    /// Records how long `faults` faults took from being read to their pages being installed.
    pub(crate) fn record_services(&mut self, took: Duration, faults: u64) {
        let ns = nanoseconds(took);
        self.service_times.record_n(ns, faults);
        self.service
            .saturating_record_n(ns.max(1), u32::try_from(faults).unwrap_or(u32::MAX));
    }

    /// What the counters say now.
    #[must_use]
    pub fn snapshot(&self, pages_installed: u64, worker_major_faults: u64) -> SessionStats {
        let us = |quantile| self.service.value_at_quantile(quantile) as f64 / 1000.0;
        SessionStats {
            faults: self.faults,
            pages_copied: self.pages_copied,
            pages_read: self.pages_read,
            pages_zeroed: self.pages_zeroed,
            already_present: self.already_present,
            retries: self.retries,
            removes: self.removes,
            poisoned: self.poisoned,
            pages_installed,
            worker_major_faults,
            pages_loaded: self.pages_loaded,
            moves: self.moves,
            pages_replayed: self.replayed.pages,
            replay_hits: self.replayed.hits,
            replay_waste: self.replayed.waste,
            replay_stopped_early: self.replayed.stopped_early,
            service: self.service_times.clone(),
            turns: self.turn_times.clone(),
            service_us_p50: us(0.50),
            service_us_p90: us(0.90),
            service_us_p99: us(0.99),
            service_us_max: self.service.max() as f64 / 1000.0,
        }
    }
}

fn nanoseconds(took: Duration) -> u64 {
    u64::try_from(took.as_nanos()).unwrap_or(LONGEST_NS)
}

/// The counters of one session as they travel to the daemon. Times are from the fault
/// event being read to its page being installed, in microseconds; of the faults that were
/// answered at once, one in eight is in them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SessionStats {
    /// Fault events read.
    pub faults: u64,
    /// Pages installed by copying from the page cache.
    pub pages_copied: u64,
    /// Pages installed after a read from disk.
    pub pages_read: u64,
    /// Zero pages installed.
    pub pages_zeroed: u64,
    /// Faults that found their page installed already.
    pub already_present: u64,
    /// Installs refused with `EAGAIN` and tried again.
    pub retries: u64,
    /// `REMOVE` events.
    pub removes: u64,
    /// Pages made to fail because their content could not be read.
    pub poisoned: u64,
    /// Pages of the guest that are installed now.
    pub pages_installed: u64,
    /// Times that the session's worker waited for a disk in a page fault of its own, for any
    /// session since it was started: there should be none.
    #[serde(default)]
    pub worker_major_faults: u64,
    /// Pages installed in the background by loading all memory.
    #[serde(default)]
    pub pages_loaded: u64,
    /// How often the session moved to another worker.
    #[serde(default)]
    pub moves: u64,
    /// Pages installed by replaying a working set.
    #[serde(default)]
    pub pages_replayed: u64,
    /// About how many of those the guest has asked for since: one page in 128 of the set is
    /// left out, and its faults are counted.
    #[serde(default)]
    pub replay_hits: u64,
    /// About how many it has not asked for.
    #[serde(default)]
    pub replay_waste: u64,
    /// The replay was given up, because the guest asked for other pages.
    #[serde(default)]
    pub replay_stopped_early: bool,
    /// Service times in buckets.
    #[serde(default)]
    pub service: Times,
    /// How long turns took that answered a fault at once; one in eight is in them.
    #[serde(default)]
    pub turns: Times,
    /// Median service time.
    pub service_us_p50: f64,
    /// 90th percentile.
    pub service_us_p90: f64,
    /// 99th percentile.
    pub service_us_p99: f64,
    /// Longest.
    pub service_us_max: f64,
}
