//! A restore by the driver, from the request until the VMM has let the guest run and until the guest's
//! first word, beside the same VMM driven by a bare script of the same calls; both with a process that was
//! started before the request, and without.
//!
//! The guest is a few instructions that touch a few pages and say so on the serial port, so that what is measured is
//! everything around it; or a Linux, whose first answer comes from envd. Closed loop, one restore at a time; the build is in the page cache, and one engine
//! serves all ways.

mod bare;
mod bare_cloud;
mod bare_qemu;
mod emulated;
mod guest;
mod serving;
mod stage;
mod ways;

use std::cell::RefCell;
use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use appliance::network::SlotIndex;
use appliance::vmm::launch;
use serde::Serialize;

use self::stage::Stage;
use self::ways::{Took, Way};
use crate::config;
use crate::host::Host;
use crate::report;
use crate::report::latency::{Latencies, Percentiles};
use crate::report::parts::{Bound, Part, PartsReport};
use crate::workload::rounds::interleaved;

const PATIENCE: Duration = Duration::from_secs(30);
/// The slot of restores without a process that waits; it is in use all the time.
const OWN_SLOT: SlotIndex = SlotIndex(0);
/// The slot of those with one, which is given back after each.
const POOLED_SLOT: SlotIndex = SlotIndex(1);

/// What was the same for all parts, and what was seen of each in all rounds.
#[derive(Clone, Debug, Serialize)]
struct Setup {
    rounds: u32,
    restores: u32,
    vmm: String,
    memory_mb: u32,
    page_bytes: u64,
    latencies_us: Vec<(String, Percentiles)>,
}

impl Display for Setup {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "setup    {}, {} MiB in pages of {} KiB; {} restores per round and way, medians of {} rounds after one not \
             counted, then the range",
            self.vmm,
            self.memory_mb,
            self.page_bytes >> 10,
            self.restores,
            self.rounds
        )?;
        let title = "all rounds, ms";
        write!(
            f,
            "\n\n  {title:42}{:>7}{:>9}{:>9}{:>9}{:>9}{:>9}",
            "count", "p50", "p90", "p99", "p99.9", "max"
        )?;
        for (name, us) in &self.latencies_us {
            write!(
                f,
                "\n  {name:42}{:>7}{:>9.3}{:>9.3}{:>9.3}{:>9.3}{:>9.3}",
                us.count,
                us.p50 / 1e3,
                us.p90 / 1e3,
                us.p99 / 1e3,
                us.p99_9 / 1e3,
                us.max / 1e3
            )?;
        }
        Ok(())
    }
}

/// What is read off a restore.
type Measure = (&'static str, fn(&Took) -> Duration);

const RUNNING: Measure = ("until it runs", |took| took.running);
const OWN: Measure = ("our own part", |took| took.own);

/// The one that ends with what the guest says.
const fn answer(name: &'static str) -> Measure {
    (name, |took| took.answered)
}

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &config::Restore) -> Result<()> {
    if config.emulated {
        return emulated::run(config);
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "Network namespaces and VMMs need root"
    );
    let dir = tempfile::Builder::new()
        .prefix("bench-restore-")
        .tempdir_in(in_memory())?;
    launch::prepare_host()?;
    let stage = RefCell::new(Stage::set(config, dir.path())?);
    let waits = stage.borrow().driver.prepares().is_some();
    let ways: Vec<Way> = Way::ALL
        .into_iter()
        .filter(|way| waits || !way.waits())
        .collect();
    let seen: RefCell<Vec<(Way, Vec<Took>)>> = RefCell::default();
    let (stage_of_all, seen_of_all) = (&stage, &seen);
    let passes = ways.iter().map(|&way| {
        let once = move || {
            let took = stage_of_all.borrow_mut().restore(way, config)?;
            let typical = percentile_ms(&took, RUNNING.1, 0.5);
            seen_of_all.borrow_mut().push((way, took));
            Ok(typical)
        };
        (
            way.name().to_owned(),
            Box::new(once) as Box<dyn FnMut() -> Result<f64>>,
        )
    });
    interleaved(config.rounds, passes.collect())?;
    let stage = stage.into_inner();
    let (info, shape) = (stage.driver.info(), &stage.guest.shape);
    let seen = Seen {
        // The first round doesn't count.
        took: seen.into_inner().split_off(ways.len()),
        ways,
        answer: answer(stage.guest.answer()),
    };
    let report = PartsReport {
        bench: "restore",
        host: Host::describe(dir.path())?,
        setup: Setup {
            rounds: config.rounds,
            restores: config.restores,
            vmm: format!("{} {} ({})", info.name, info.version, info.accelerator),
            memory_mb: shape.memory_mb,
            page_bytes: shape.memory().page_size.bytes(),
            latencies_us: seen.of_all_rounds()?,
        },
        parts: seen.parts(stage.guest.about()),
    };
    stage.clear()?;
    report::publish(&report, config.json.as_deref())
}

/// Where sockets and device states lie: in memory, as a host's `/run` does.
fn in_memory() -> &'static Path {
    let is_tmpfs = |path: &Path| {
        let found = nix::sys::statfs::statfs(path);
        found.is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC)
    };
    let (run, memory) = (Path::new("/run"), Path::new("/dev/shm"));
    if !is_tmpfs(run) && is_tmpfs(memory) {
        memory
    } else {
        run
    }
}

/// What was seen in all rounds that count.
struct Seen {
    took: Vec<(Way, Vec<Took>)>,
    ways: Vec<Way>,
    answer: Measure,
}

impl Seen {
    fn of_all_rounds(&self) -> Result<Vec<(String, Percentiles)>> {
        let mut all = Vec::new();
        for &way in &self.ways {
            for (name, measure) in [RUNNING, OWN, self.answer] {
                // A script has no part that is ours.
                if name == OWN.0 && !way.is_ours() {
                    continue;
                }
                let mut latencies = Latencies::new();
                for (_, took) in self.took.iter().filter(|(of, _)| *of == way) {
                    let ns = took.iter().map(|took| measure(took).as_nanos());
                    let ns: Vec<u32> = ns.map(|ns| u32::try_from(ns).unwrap_or(u32::MAX)).collect();
                    latencies.add(&Latencies::of(&ns))?;
                }
                all.push((format!("{}, {name}", way.name()), latencies.percentiles()));
            }
        }
        Ok(all)
    }

    fn parts(&self, about_answer: &str) -> Vec<Part> {
        let about_running = "p50, from the request to the VMM's word that the guest runs";
        vec![
            self.compared(about_running, RUNNING),
            self.own(),
            self.compared(about_answer, self.answer),
        ]
    }

    fn compared(&self, about: &str, measure: Measure) -> Part {
        let samples = self.ways.iter();
        let samples = samples.map(|&way| (way.name().to_owned(), self.by_round(way, measure, 0.5)));
        let mut part = Part::new(measure.0, about, "ms", samples.collect());
        for (ours, bare) in [
            (Way::Driver, Way::Script),
            (Way::DriverWaiting, Way::ScriptWaiting),
        ] {
            if self.ways.contains(&ours) {
                part = part
                    .ratio(ours.name(), bare.name())
                    .ratio_goal(Bound::AtMost(1.1));
            }
        }
        if self.ways.contains(&Way::DriverWaiting) {
            part = part.ratio(Way::DriverWaiting.name(), Way::Driver.name());
        }
        part
    }

    fn own(&self) -> Part {
        let about = "what the VMM was not waited for";
        let waits = self.ways.contains(&Way::DriverWaiting);
        let (way, typical, worst) = if waits {
            (
                Way::DriverWaiting,
                "with a process waiting, p50",
                "the same, p99",
            )
        } else {
            (Way::Driver, "p50", "p99")
        };
        let samples = [(typical, 0.5), (worst, 0.99)];
        let samples = samples.map(|(name, at)| (name.to_owned(), self.by_round(way, OWN, at)));
        let part = Part::new(OWN.0, about, "ms", samples.into());
        if waits {
            part.goal(typical, Bound::AtMost(1.0))
                .goal(worst, Bound::AtMost(3.0))
        } else {
            part
        }
    }

    fn by_round(&self, way: Way, measure: Measure, at: f64) -> Vec<f64> {
        let rounds = self.took.iter().filter(|(of, _)| *of == way);
        rounds
            .map(|(_, took)| percentile_ms(took, measure.1, at))
            .collect()
    }
}

fn percentile_ms(took: &[Took], measure: fn(&Took) -> Duration, at: f64) -> f64 {
    let mut sorted: Vec<f64> = took
        .iter()
        .map(|took| measure(took).as_secs_f64() * 1e3)
        .collect();
    sorted.sort_by(f64::total_cmp);
    let index = ((sorted.len() as f64 * at).ceil() as usize).clamp(1, sorted.len());
    sorted[index - 1]
}
