//! Numbers for Prometheus. No sandbox is a label: their number has no limit, and each one's own
//! numbers are in the API.
//!
//! Names and labels are stable; `dashboard.json` beside this crate's manifest shows them in Grafana,
//! and a test holds it against what is served.

mod faults;
mod labels;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use http_api::ApiError;
use http_api::wire::{HostInfo, HostStatus};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::network::Depth;
use crate::vmm::ready::Counts;
use faults::Served;
use labels::{Operation, State, Until, Waiting};

pub use faults::Faults;
pub use labels::{Milestone, Timed};

/// All of them.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    operations: Family<Operation, Histogram>,
    restores: Family<Until, Histogram>,
    sandboxes: Family<State, Gauge>,
    templates: Gauge,
    draining: Gauge,
    slots: Gauge,
    slots_used: Gauge,
    memory_allocated: Gauge,
    vcpus_allocated: Gauge,
    disk_available: Gauge,
    memory_available: Gauge,
    /// Requests for what runs in sandboxes.
    pub traffic: Counter,
    /// Paused sandboxes that traffic brought back.
    pub woken: Counter,
    /// Sandboxes whose time was up.
    pub expired: Counter,
    /// When the daemon began, Unix seconds.
    started: Gauge<f64, AtomicU64>,
    slots_waiting: Family<Waiting, Gauge>,
    vmms_waiting: Gauge,
    /// What became of VMMs that waited.
    pub vmms: Counts,
    /// What engines have done.
    pub faults: Arc<Faults>,
}

impl Default for Metrics {
    fn default() -> Self {
        // From a request that touches nothing to a boot under emulation.
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 16));
        // From the claim of what waits to a first answer under emulation.
        let fine_seconds = || Histogram::new(exponential_buckets(0.0001, 2.0, 18));
        let mut metrics = Self {
            registry: Registry::with_prefix("thaw"),
            operations: Family::new_with_constructor(seconds),
            restores: Family::new_with_constructor(fine_seconds),
            sandboxes: Family::default(),
            templates: Gauge::default(),
            draining: Gauge::default(),
            slots: Gauge::default(),
            slots_used: Gauge::default(),
            memory_allocated: Gauge::default(),
            vcpus_allocated: Gauge::default(),
            disk_available: Gauge::default(),
            memory_available: Gauge::default(),
            traffic: Counter::default(),
            woken: Counter::default(),
            expired: Counter::default(),
            started: Gauge::default(),
            slots_waiting: Family::default(),
            vmms_waiting: Gauge::default(),
            vmms: Counts::default(),
            faults: Arc::default(),
        };
        metrics.register();
        metrics.started.set(crate::clock::now_ms() as f64 / 1000.0);
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let r = &mut self.registry;
        r.register_with_unit(
            "operation",
            "How long operations took, by outcome",
            Unit::Seconds,
            self.operations.clone(),
        );
        r.register_with_unit(
            "restore",
            "How long restores took from their beginning until they had got so far",
            Unit::Seconds,
            self.restores.clone(),
        );
        let sandboxes = self.sandboxes.clone();
        r.register("sandboxes", "Sandboxes by state", sandboxes);
        r.register("templates", "Templates", self.templates.clone());
        let draining = self.draining.clone();
        r.register("draining", "Whether the host takes no new work", draining);
        r.register("slots", "Network slots there are", self.slots.clone());
        let used = self.slots_used.clone();
        r.register("slots_used", "Network slots of sandboxes", used);
        r.register(
            "slots_waiting",
            "Network slots that are built and wait: for new sandboxes, or for paused ones",
            self.slots_waiting.clone(),
        );
        let waiting = self.vmms_waiting.clone();
        r.register("vmms_waiting", "VMMs that are started and wait", waiting);
        for (name, help, counter) in [
            (
                "vmms_claimed",
                "Restores that found a VMM waiting",
                &self.vmms.claimed,
            ),
            (
                "vmms_missing",
                "Restores that found none",
                &self.vmms.missing,
            ),
            (
                "vmms_lost",
                "Waiting VMMs that died or lost their slot",
                &self.vmms.lost,
            ),
        ] {
            r.register(name, help, counter.clone());
        }
        r.register_collector(Box::new(Served(self.faults.clone())));
        r.register_with_unit(
            "memory_allocated",
            "Memory that running sandboxes may come to use",
            Unit::Bytes,
            self.memory_allocated.clone(),
        );
        r.register_with_unit(
            "memory_available",
            "Memory of the host that could be had",
            Unit::Bytes,
            self.memory_available.clone(),
        );
        r.register_with_unit(
            "disk_available",
            "Free bytes of the file system of builds and disks",
            Unit::Bytes,
            self.disk_available.clone(),
        );
        r.register(
            "vcpus_allocated",
            "Virtual CPUs of running sandboxes",
            self.vcpus_allocated.clone(),
        );
        r.register(
            "traffic_requests",
            "Requests for what runs in sandboxes",
            self.traffic.clone(),
        );
        r.register(
            "traffic_resumes",
            "Paused sandboxes that traffic brought back",
            self.woken.clone(),
        );
        r.register(
            "expired",
            "Sandboxes whose time was up",
            self.expired.clone(),
        );
        r.register_with_unit(
            "start_time",
            "When the daemon began",
            Unit::Seconds,
            self.started.clone(),
        );
    }

    /// Does something and writes down how long it took.
    ///
    /// # Errors
    /// As what is done.
    pub async fn time<T>(
        &self,
        operation: Timed,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let began = Instant::now();
        let done = work.await;
        let outcome = done.as_ref().map_or_else(ApiError::code, |_| "ok");
        let labels = Operation { operation, outcome };
        let seconds = began.elapsed().as_secs_f64();
        self.operations.get_or_create(&labels).observe(seconds);
        done
    }

    /// Writes down how long a restore took until each.
    pub fn restored(
        &self,
        was_waiting: bool,
        took: impl IntoIterator<Item = (Milestone, Duration)>,
    ) {
        let vmm = if was_waiting { "waiting" } else { "started" };
        for (until, took) in took {
            let labels = Until { until, vmm };
            let histogram = self.restores.get_or_create(&labels);
            histogram.observe(took.as_secs_f64());
        }
    }

    /// All of them as text, with what the host is like now. Source: OpenMetrics 1.0.
    ///
    /// # Errors
    /// They can't be written, which is not to be expected of memory.
    pub fn text(&self, host: &HostInfo, waiting: Depth, vmms: usize) -> Result<String, fmt::Error> {
        let mib = |mib: u64| i64::try_from(mib << 20).unwrap_or(i64::MAX);
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        // States that nothing is in any more are gone, too.
        self.sandboxes.clear();
        for (state, count) in &host.states {
            let state = State {
                state: state.clone(),
            };
            self.sandboxes
                .get_or_create(&state)
                .set(number(*count as u64));
        }
        self.templates.set(number(host.templates as u64));
        self.draining
            .set(i64::from(host.status == HostStatus::Draining));
        let room = &host.capacity;
        self.slots.set(number(room.slots_total));
        self.slots_used.set(number(room.slots_used));
        for (whom, count) in [("anybody", waiting.free), ("paused", waiting.kept)] {
            let whom = Waiting { r#for: whom };
            self.slots_waiting
                .get_or_create(&whom)
                .set(number(count as u64));
        }
        self.vmms_waiting.set(number(vmms as u64));
        self.memory_allocated.set(mib(room.memory_allocated_mb));
        self.memory_available.set(mib(room.memory_available_mb));
        self.disk_available.set(mib(room.disk_available_mb));
        self.vcpus_allocated.set(number(room.vcpus_allocated));
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use http_api::wire::{Capacity, CpuInfo, VmmInfo};

    use super::*;

    fn host(states: &[(&str, usize)]) -> HostInfo {
        HostInfo {
            version: "0".into(),
            status: HostStatus::Draining,
            kernel: "6".into(),
            vmm: VmmInfo {
                name: "none".into(),
                version: "0".into(),
                accelerator: "none".into(),
                reason: "a test".into(),
            },
            disks: "none".into(),
            shards: 1,
            engines: 1,
            workers: "block".into(),
            sandboxes: 3,
            states: states
                .iter()
                .map(|(s, n)| ((*s).to_owned(), *n))
                .collect::<BTreeMap<_, _>>(),
            templates: 2,
            cpu: CpuInfo::default(),
            nodes: vec![],
            hugepages: vec![],
            capacity: Capacity {
                memory_allocated_mb: 256,
                ..Capacity::default()
            },
        }
    }

    #[tokio::test]
    async fn operations_are_counted_by_outcome() {
        let metrics = Metrics::default();
        let good = async { Ok(7) };
        assert_eq!(metrics.time(Timed::Resume, good).await, Ok(7));
        let full = async {
            Err::<(), _>(ApiError::Full {
                detail: "No room".into(),
            })
        };
        assert!(metrics.time(Timed::Resume, full).await.is_err());
        let text = metrics
            .text(
                &host(&[("running", 2), ("paused", 1)]),
                Depth { free: 3, kept: 1 },
                2,
            )
            .unwrap();
        for line in [
            "thaw_operation_seconds_count{operation=\"resume\",outcome=\"ok\"} 1",
            "thaw_operation_seconds_count{operation=\"resume\",outcome=\"capacity_exhausted\"} 1",
            "thaw_sandboxes{state=\"running\"} 2",
            "thaw_draining 1",
            "thaw_vmms_waiting 2",
            "thaw_slots_waiting{for=\"anybody\"} 3",
            "thaw_memory_allocated_bytes 268435456",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in:\n{text}"
            );
        }
        // What nothing is in any more is not shown as it was.
        let text = metrics
            .text(&host(&[("paused", 3)]), Depth::default(), 0)
            .unwrap();
        assert!(!text.contains("state=\"running\""), "{text}");
    }

    #[test]
    fn restores_are_timed_until_each_milestone() {
        let metrics = Metrics::default();
        metrics.restored(true, [(Milestone::Claimed, Duration::from_micros(150))]);
        let text = metrics.text(&host(&[]), Depth::default(), 0).unwrap();
        for line in [
            "thaw_restore_seconds_bucket{le=\"0.0001\",until=\"claimed\",vmm=\"waiting\"} 0",
            "thaw_restore_seconds_bucket{le=\"0.0002\",until=\"claimed\",vmm=\"waiting\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
        }
    }

    #[tokio::test]
    async fn the_dashboard_shows_what_there_is() {
        let metrics = Metrics::default();
        metrics.restored(false, [(Milestone::Answered, Duration::ZERO)]);
        let _ = metrics.time(Timed::Create, async { Ok(()) }).await;
        let text = metrics
            .text(&host(&[("running", 1)]), Depth::default(), 0)
            .unwrap();
        let names = text.lines().filter(|line| !line.starts_with('#'));
        let served: BTreeSet<&str> = names
            .filter_map(|line| line.split(['{', ' ']).next())
            .collect();
        let dashboard = include_str!("../../dashboard.json");
        let parsed: serde_json::Value = serde_json::from_str(dashboard).unwrap();
        assert!(parsed["panels"].as_array().unwrap().len() >= 8);
        let mut shown = 0;
        for part in dashboard.split("thaw_").skip(1) {
            let end = part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let name = format!("thaw_{}", &part[..end.unwrap()]);
            assert!(served.contains(name.as_str()), "{name} is not in:\n{text}");
            shown += 1;
        }
        assert!(shown >= 10, "{shown}");
    }
}
