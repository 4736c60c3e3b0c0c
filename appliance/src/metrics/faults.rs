//! What the engines have done for all sandboxes together, also for those that no longer run.
//!
//! An engine counts by session. A session that ends takes its counts along, and one whose engine was
//! replaced begins anew, so sums of what is there would fall; here they only grow.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use uffd_engine::{SessionStats, Times};

/// Counts of all sessions there were.
#[derive(Debug, Default)]
pub struct Faults {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ended: Totals,
    /// As they were last seen.
    live: BTreeMap<String, SessionStats>,
}

/// Sums over sessions.
#[derive(Clone, Debug, Default, PartialEq)]
struct Totals {
    faults: u64,
    pages_copied: u64,
    pages_read: u64,
    pages_zeroed: u64,
    pages_replayed: u64,
    pages_loaded: u64,
    retries: u64,
    poisoned: u64,
    service: Times,
    turns: Times,
}

impl Totals {
    fn add(&mut self, stats: &SessionStats) {
        for (sum, more) in [
            (&mut self.faults, stats.faults),
            (&mut self.pages_copied, stats.pages_copied),
            (&mut self.pages_read, stats.pages_read),
            (&mut self.pages_zeroed, stats.pages_zeroed),
            (&mut self.pages_replayed, stats.pages_replayed),
            (&mut self.pages_loaded, stats.pages_loaded),
            (&mut self.retries, stats.retries),
            (&mut self.poisoned, stats.poisoned),
        ] {
            *sum += more;
        }
        self.service.add(&stats.service);
        self.turns.add(&stats.turns);
    }
}

impl State {
    fn end(&mut self, session: &str) {
        if let Some(stats) = self.live.remove(session) {
            self.ended.add(&stats);
        }
    }

    fn see(&mut self, session: String, stats: SessionStats) {
        // Less than before: its engine is another one, and what the one before did stays done.
        let anew = self
            .live
            .get(&session)
            .is_some_and(|before| before.faults > stats.faults);
        if anew {
            self.end(&session);
        }
        self.live.insert(session, stats);
    }
}

impl Faults {
    /// What sessions say now. Those that are not in `present` have ended.
    pub fn look(&self, present: &BTreeSet<String>, said: BTreeMap<String, SessionStats>) {
        let mut state = self.state.lock();
        let gone: Vec<String> = state.live.keys().cloned().collect();
        for session in gone.iter().filter(|session| !present.contains(*session)) {
            state.end(session);
        }
        for (session, stats) in said {
            state.see(session, stats);
        }
    }

    /// The last words of a session.
    pub fn end(&self, session: &str, stats: &SessionStats) {
        let mut state = self.state.lock();
        state.see(session.to_owned(), stats.clone());
        state.end(session);
    }

    fn totals(&self) -> (Totals, u64, usize) {
        let state = self.state.lock();
        let mut totals = state.ended.clone();
        for stats in state.live.values() {
            totals.add(stats);
        }
        let resident = state.live.values().map(|stats| stats.pages_installed);
        (totals, resident.sum(), state.live.len())
    }
}

/// The handle that the registry asks.
#[derive(Debug)]
pub(super) struct Served(pub(super) std::sync::Arc<Faults>);

impl Collector for Served {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let (totals, resident, sessions) = self.0.totals();
        let counts = [
            (
                "faults",
                "Page faults of guests that engines have read",
                totals.faults,
            ),
            (
                "pages_copied",
                "Pages installed from the page cache",
                totals.pages_copied,
            ),
            (
                "pages_read",
                "Pages installed after a read from disk",
                totals.pages_read,
            ),
            ("pages_zeroed", "Zero pages installed", totals.pages_zeroed),
            (
                "pages_replayed",
                "Pages installed because earlier resumes had touched them",
                totals.pages_replayed,
            ),
            (
                "pages_loaded",
                "Pages installed by loading all memory",
                totals.pages_loaded,
            ),
            (
                "install_retries",
                "Installs that the kernel put off",
                totals.retries,
            ),
            (
                "pages_poisoned",
                "Pages made to fail because they could not be read",
                totals.poisoned,
            ),
        ];
        for (name, help, count) in counts {
            let counter = ConstCounter::new(count);
            let encoder = to.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(encoder)?;
        }
        for (name, help, number) in [
            (
                "pages_resident",
                "Pages of restored guests that are installed",
                resident,
            ),
            ("sessions", "Guests whose memory is served", sessions as u64),
        ] {
            let gauge = ConstGauge::new(i64::try_from(number).unwrap_or(i64::MAX));
            let encoder = to.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(encoder)?;
        }
        for (name, help, times) in [
            (
                "fault_service",
                "From a fault being read to its page being installed; one turn in eight is timed",
                &totals.service,
            ),
            (
                "engine_turn",
                "How long engines took over turns that answered faults; one in eight is timed",
                &totals.turns,
            ),
        ] {
            let times = Seconds(times);
            let encoder =
                to.encode_descriptor(name, help, Some(&Unit::Seconds), times.metric_type())?;
            times.encode(encoder)?;
        }
        Ok(())
    }
}

/// Times as a histogram in seconds.
struct Seconds<'a>(&'a Times);

impl EncodeMetric for Seconds<'_> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = Times::BOUNDS_NS.iter().map(|ns| *ns as f64 / 1e9);
        let counts = self.0.counts();
        let buckets: Vec<(f64, u64)> = bounds.chain([f64::INFINITY]).zip(counts).collect();
        let (sum, count) = (
            self.0.sum_ns() as f64 / 1e9,
            buckets.iter().map(|b| b.1).sum(),
        );
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(faults: u64, resident: u64) -> SessionStats {
        SessionStats {
            faults,
            pages_installed: resident,
            ..SessionStats::default()
        }
    }

    fn look(faults: &Faults, present: &[&str], said: &[(&str, SessionStats)]) {
        let present = present.iter().map(|name| (*name).to_owned()).collect();
        let said = said
            .iter()
            .map(|(name, stats)| ((*name).to_owned(), stats.clone()));
        faults.look(&present, said.collect());
    }

    fn sums(faults: &Faults) -> (u64, u64, usize) {
        let (totals, resident, sessions) = faults.totals();
        (totals.faults, resident, sessions)
    }

    #[test]
    fn sums_never_fall_whatever_becomes_of_sessions() {
        let faults = Faults::default();
        look(
            &faults,
            &["a", "b"],
            &[("a", stats(5, 50)), ("b", stats(7, 70))],
        );
        assert_eq!(sums(&faults), (12, 120, 2));
        // One says nothing, and is there still.
        look(&faults, &["a", "b"], &[("a", stats(6, 60))]);
        assert_eq!(sums(&faults), (13, 130, 2));
        // One ends with last words, the other without.
        faults.end("a", &stats(9, 90));
        assert_eq!(sums(&faults), (16, 70, 1));
        look(&faults, &["a"], &[("a", stats(1, 10))]);
        assert_eq!(sums(&faults), (17, 10, 1), "a began anew");
        // Its engine is replaced.
        look(&faults, &["a"], &[("a", stats(0, 8))]);
        assert_eq!(sums(&faults), (17, 8, 1));
    }

    #[test]
    fn times_become_buckets_in_seconds() {
        let mut served = Times::default();
        served.record_n(1_500, 3);
        served.record_n(10_000_000_000, 1);
        let faults = std::sync::Arc::new(Faults::default());
        let session = SessionStats {
            faults: 4,
            service: served,
            ..SessionStats::default()
        };
        faults.end("a", &session);
        let mut registry = prometheus_client::registry::Registry::with_prefix("thaw");
        registry.register_collector(Box::new(Served(faults)));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "thaw_faults_total 4",
            "thaw_fault_service_seconds_bucket{le=\"0.000001\"} 0",
            "thaw_fault_service_seconds_bucket{le=\"0.000002\"} 3",
            "thaw_fault_service_seconds_bucket{le=\"+Inf\"} 4",
            "thaw_fault_service_seconds_count 4",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in:\n{text}"
            );
        }
    }
}
