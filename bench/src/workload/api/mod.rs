//! The API over loopback: whether it answers 10,000 GETs a second, and how long a request takes that
//! pauses and resumes nothing, while nothing else happens and while an engine serves faults.
//!
//! **Open loop**: requests are due at fixed times, whatever became of those before, and one that has
//! to wait for its connection is counted from when it was due. The daemon has no sandboxes: what is
//! asked is the whole way of a request, through every shard, and the least of an answer.

mod daemon;
mod faults;
mod load;

use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Serialize;

use self::daemon::Daemon;
use self::faults::Faults;
use self::load::{Load, Outcome};
use crate::config::Api;
use crate::host::Host;
use crate::report;
use crate::report::latency::Percentiles;
use crate::report::parts::{Bound, Part, PartsReport};
use crate::workload::rounds::interleaved;

/// What is asked of the listing: every shard is.
const PATH: &str = "/v1/sandboxes";
/// Requests a second at which a single one's time is taken: far from what the machine can do, so that
/// what is seen is not a queue.
const CALM: u64 = 1000;

/// What was the same for all parts.
#[derive(Clone, Debug, Serialize)]
struct Setup {
    rounds: u32,
    #[serde(rename = "loop")]
    open_loop: &'static str,
    path: &'static str,
    requests_per_s: u64,
    calm_requests_per_s: u64,
    connections: usize,
    seconds: u64,
    shards: usize,
    fault_mib: u64,
    seed: u64,
}

impl Display for Setup {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "setup    GET {}, {} over {} connections, {} s each; {} shards; faults: {} MiB again and \
             again, warm, seed {}; medians of {} rounds after one not counted, then the range",
            self.path,
            self.open_loop,
            self.connections,
            self.seconds,
            self.shards,
            self.fault_mib,
            self.seed,
            self.rounds
        )
    }
}

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &Api) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "The daemon needs root");
    let daemon = Daemon::start(&config.thaw)?;
    let duration = Duration::from_secs(config.seconds);
    let load = |per_s| Load {
        address: daemon.address,
        path: PATH,
        per_s,
        connections: config.connections,
        duration,
    };
    let rate = throughput(config, &load(config.rate))?;
    let [latency, faults] = alone_and_under_faults(config, &load(CALM))?;
    let parts = vec![rate, latency, faults];
    daemon.stop()?;
    let report = PartsReport {
        bench: "api",
        host: Host::describe(Path::new("/run"))?,
        setup: Setup {
            rounds: config.rounds,
            open_loop: "open loop",
            path: PATH,
            requests_per_s: config.rate,
            calm_requests_per_s: CALM,
            connections: config.connections,
            seconds: config.seconds,
            shards: std::thread::available_parallelism()?.get(),
            fault_mib: config.pages >> 8,
            seed: config.seed,
        },
        parts,
    };
    report::publish(&report, config.json.as_deref())
}

/// Whether so many requests a second are answered, all of them well.
fn throughput(config: &Api, load: &Load) -> Result<Part> {
    let (mut failed, mut p50, mut p99) = (Vec::new(), Vec::new(), Vec::new());
    let way = || {
        let Outcome {
            answered,
            errors,
            took,
            latencies,
        } = load.run()?;
        let found = latencies.percentiles();
        failed.push(errors as f64);
        p50.push(found.p50 / 1000.0);
        p99.push(found.p99 / 1000.0);
        Ok(answered as f64 / took.as_secs_f64())
    };
    let mut samples = interleaved(
        config.rounds,
        vec![("answered a second".into(), Box::new(way))],
    )?;
    // The first round doesn't count.
    samples.push(("errors".into(), failed.split_off(1)));
    samples.push(("p50, ms".into(), p50.split_off(1)));
    samples.push(("p99, ms".into(), p99.split_off(1)));
    let about = format!("{} GETs a second", config.rate);
    // All that were due in a second are answered in about that second.
    let enough = config.rate as f64 * 0.99;
    Ok(Part::new("rate", about, "", samples)
        .goal("answered a second", Bound::AtLeast(enough))
        .goal("errors", Bound::AtMost(0.0)))
}

/// One request's time, by itself and beside an engine that serves faults.
fn alone_and_under_faults(config: &Api, load: &Load) -> Result<[Part; 2]> {
    let mut faults = Faults::start(config)?;
    let (mut idle, mut busy, mut per_ms) = (Vec::new(), Vec::new(), Vec::new());
    let mut samples = interleaved(
        config.rounds,
        vec![
            (
                "idle, p99".into(),
                Box::new(|| {
                    let found = answered(load)?;
                    idle.push(found.p50);
                    Ok(found.p99)
                }),
            ),
            (
                "under faults, p99".into(),
                Box::new(|| {
                    let (found, rate) = faults.during(|| answered(load))?;
                    busy.push(found.p50);
                    per_ms.push(rate);
                    Ok(found.p99)
                }),
            ),
        ],
    )?;
    samples.push(("idle, p50".into(), idle.split_off(1)));
    samples.push(("under faults, p50".into(), busy.split_off(1)));
    let about = format!("one GET, {CALM} a second");
    let latency = Part::new("latency", about, "µs", samples)
        .ratio("under faults, p50", "idle, p50")
        .ratio("under faults, p99", "idle, p99")
        .ratio_goal(Bound::AtMost(2.0));
    let served = vec![("served".to_owned(), per_ms.split_off(1))];
    let faults = Part::new("faults", "those beside the requests", "a ms", served);
    Ok([latency, faults])
}

/// The latencies of a load that has to be answered without an error.
fn answered(load: &Load) -> Result<Percentiles> {
    let outcome = load.run()?;
    ensure!(outcome.errors == 0, "{} requests failed", outcome.errors);
    Ok(outcome.latencies.percentiles())
}
