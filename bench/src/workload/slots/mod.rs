//! Network slots: what a sandbox waits for one, from the pool and without it, and what building one
//! costs beside a plain loop that sends the same messages.
//!
//! All in a network namespace of the run's own; on one thread, one slot at a time (closed loop).

mod bare;

use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use appliance::network::{Egress, Pool, SlotIndex, Slots, slots};
use http_api::wire::NetworkPolicy;
use nix::sched::{CloneFlags, unshare};
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::config;
use crate::host::Host;
use crate::report;
use crate::report::latency::Latencies;
use crate::report::parts::{Bound, Part, PartsReport};
use crate::workload::rounds::interleaved;

/// Slots that wait.
const READY: usize = 8;
/// How long the pool may take to be full again.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was the same for all parts.
#[derive(Clone, Debug, Serialize)]
struct Setup {
    rounds: u32,
    slots: u32,
    ready_slots: usize,
}

impl Display for Setup {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "setup    {} slots per round and way, {} kept ready; medians of {} rounds after one \
             not counted, then the range",
            self.slots, self.ready_slots, self.rounds
        )
    }
}

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &config::Slots) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "Network namespaces need root"
    );
    unshare(CloneFlags::CLONE_NEWNET).context("Making a network namespace")?;
    let report = PartsReport {
        bench: "slots",
        host: Host::describe(Path::new("/run"))?,
        setup: Setup {
            rounds: config.rounds,
            slots: config.slots,
            ready_slots: READY,
        },
        parts: vec![acquire(config)?, build(config)?],
    };
    report::publish(&report, config.json.as_deref())
}

pub(super) fn egress() -> Egress {
    Egress {
        internet: true,
        closed: ["10.0.0.0/8", "169.254.0.0/16"]
            .map(|net| net.parse().expect("a network"))
            .to_vec(),
        resolver: Some([192, 0, 2, 53].into()),
    }
}

/// An instance's slots, and a runtime to ask for them on.
struct Subject {
    slots: Slots,
    runtime: Runtime,
    instance: &'static str,
}

impl Subject {
    fn start(instance: &'static str, pool: &str) -> Result<Self> {
        let pool: Pool = pool.parse()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let slots = Slots::start(instance, pool, egress()).context("Starting slots")?;
        // Of a run that was killed.
        for index in slots::existing(instance)? {
            runtime.block_on(slots.take_down(index))?;
        }
        Ok(Self {
            slots,
            runtime,
            instance,
        })
    }

    fn take(&self, index: SlotIndex) -> Result<Duration> {
        let started = Instant::now();
        let taking = self.slots.take(index, NetworkPolicy::default());
        let slot = self.runtime.block_on(taking)?;
        let took = started.elapsed();
        drop(slot);
        Ok(took)
    }

    fn end(self) -> Result<()> {
        self.runtime.block_on(self.slots.end())?;
        let left = slots::existing(self.instance)?;
        ensure!(left.is_empty(), "Slots {left:?} are left over");
        Ok(())
    }
}

/// What a new sandbox waits for its slot.
fn acquire(config: &config::Slots) -> Result<Part> {
    let pooled = Subject::start("bslota", "10.233.0.0/20")?;
    pooled.slots.keep_ready(READY, []);
    let plain = Subject::start("bslotb", "10.233.16.0/20")?;
    let count = config.slots;
    let mut slowest = Vec::new();
    let mut samples = interleaved(
        config.rounds,
        vec![
            (
                "from the pool, p50".into(),
                Box::new(|| {
                    let latencies = take_from_pool(&pooled, count)?;
                    slowest.push(p99(&latencies));
                    Ok(p50(&latencies))
                }),
            ),
            (
                "built on request, p50".into(),
                Box::new(|| Ok(p50(&build_on_request(&plain, count.min(50))?))),
            ),
        ],
    )?;
    // Of the same passes; the first round doesn't count.
    samples.push(("from the pool, p99".to_owned(), slowest.split_off(1)));
    pooled.end()?;
    plain.end()?;
    let about = "from asking for a slot to having it; the pool is full each time";
    Ok(Part::new("acquire", about, "µs", samples)
        .ratio("from the pool, p50", "built on request, p50")
        .goal("from the pool, p99", Bound::AtMost(50.0)))
}

fn p50(latencies_ns: &[u32]) -> f64 {
    Latencies::of(latencies_ns).percentiles().p50
}

fn p99(latencies_ns: &[u32]) -> f64 {
    Latencies::of(latencies_ns).percentiles().p99
}

fn nanoseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_nanos()).unwrap_or(u32::MAX)
}

fn take_from_pool(subject: &Subject, count: u32) -> Result<Vec<u32>> {
    let mut latencies = Vec::new();
    for number in 0..count {
        let index = SlotIndex(number % READY as u32);
        let deadline = Instant::now() + PATIENCE;
        while slots::existing(subject.instance)?.len() != READY {
            ensure!(
                Instant::now() < deadline,
                "The pool is not full within {PATIENCE:?}"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        latencies.push(nanoseconds(subject.take(index)?));
        subject.runtime.block_on(subject.slots.give_back(index))?;
        subject.slots.release(index);
    }
    Ok(latencies)
}

fn build_on_request(subject: &Subject, count: u32) -> Result<Vec<u32>> {
    let mut latencies = Vec::new();
    for number in 0..count {
        let index = SlotIndex(number);
        latencies.push(nanoseconds(subject.take(index)?));
        subject.runtime.block_on(subject.slots.take_down(index))?;
    }
    Ok(latencies)
}

/// What building costs beside the same messages from a plain loop.
fn build(config: &config::Slots) -> Result<Part> {
    let subject = Subject::start("bslotc", "10.233.32.0/20")?;
    let bare = bare::Bare::new("bslotd", "10.233.48.0/20".parse()?)?;
    // Each is taken down before the next: what is measured is one slot among few.
    let count = config.slots.div_ceil(4);
    let samples = interleaved(
        config.rounds,
        vec![
            (
                "bare loop".into(),
                Box::new(|| {
                    let mut latencies = Vec::new();
                    for number in 0..count {
                        let index = SlotIndex(number);
                        let started = Instant::now();
                        bare.build(index)?;
                        latencies.push(nanoseconds(started.elapsed()));
                        bare.take_down(index)?;
                    }
                    Ok(p50(&latencies) / 1000.0)
                }),
            ),
            (
                "slots".into(),
                Box::new(|| Ok(p50(&build_on_request(&subject, count)?) / 1000.0)),
            ),
        ],
    )?;
    subject.end()?;
    let about = "one slot, from nothing to usable: namespace, tap, links, addresses, routes, rules; \
                 the median of a round";
    Ok(Part::new("build", about, "ms", samples)
        .ratio("slots", "bare loop")
        .ratio_goal(Bound::AtMost(1.3)))
}
