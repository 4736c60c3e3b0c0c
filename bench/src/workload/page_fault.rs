//! One page after the other, in random order: what does a single fault cost?
//!
//! Every round measures every subject once, so that what the machine does in between falls on
//! all of them alike. A subject gets fresh memory each round and the same order of touches as
//! the others of that round.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};

use crate::args::Engine;
use crate::child::Child;
use crate::config::{PAGE_BYTES, PageFault};
use crate::faulter::{Answer, NO_UFFD, Pass, Task};
use crate::host::Host;
use crate::order;
use crate::report;
use crate::report::latency::Latencies;
use crate::report::ratio::Ratio;
use crate::report::{PageFaultReport, RoundReport, Setup, SubjectReport};
use crate::source::Source;
use crate::subject::floor::{Floor, FloorKind};
use crate::subject::ours::Ours;
use crate::subject::peer::Peer;
use crate::subject::{PATIENCE, Subject};

/// Rounds before those that count: page tables, free lists and branch predictors settle.
const WARM_UP_ROUNDS: u32 = 1;
/// How long one pass may take: hundreds of times what it should.
const PASS_PATIENCE: Duration = Duration::from_secs(120);

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &PageFault) -> Result<()> {
    // Before anything is written, and in one place: nothing works without it.
    drop(Uffd::create(FEATURE_EVENT_REMOVE).context(NO_UFFD)?);
    let source = Source::write(&config.dir, config.pages)?;
    // Unix socket paths are short, so these don't go beside the build.
    let sockets = tempfile::tempdir().context("Making a directory for sockets")?;
    let mut subjects = start(config, sockets.path(), &source)?;
    let cpu = config.cpus.faulter.to_string();
    let mut faulter = Child::spawn("faulter", ["faulter", "--cpu", &cpu])?;

    let mut results: Vec<Measured> = subjects.iter().map(|s| Measured::new(s.as_ref())).collect();
    for round in 0..WARM_UP_ROUNDS + config.rounds {
        for (subject, measured) in subjects.iter_mut().zip(&mut results) {
            let seed = config.seed.wrapping_add(u64::from(round));
            let outcome = one_round(subject.as_mut(), &mut faulter, &source, config, seed)
                .with_context(|| format!("Round {round} of {}", subject.name()))?;
            if round >= WARM_UP_ROUNDS {
                let counted = order::counted(config.order, config.pages);
                measured.add(&outcome, usize::try_from(counted)?)?;
            }
        }
    }
    let subjects: Vec<SubjectReport> = results.into_iter().map(Measured::finish).collect();
    let baseline = best_floor(&subjects).context("There is no floor")?;
    let others = subjects.iter().filter(|s| s.name != baseline.name);
    let report = PageFaultReport {
        bench: "page-fault",
        host: Host::describe(source.data())?,
        setup: setup(config),
        ratios: others.map(|s| Ratio::new(s, baseline)).collect(),
        subjects,
    };
    report::publish(&report, config.json.as_deref())
}

/// The bare loop with the best median fault: how it waits doesn't matter.
fn best_floor(subjects: &[SubjectReport]) -> Option<&SubjectReport> {
    let floors = subjects.iter().filter(|s| s.name.starts_with("floor-"));
    let p50 = |s: &SubjectReport| s.fault_us.map_or(f64::INFINITY, |us| us.p50);
    floors.min_by(|a, b| p50(a).total_cmp(&p50(b)))
}

/// Starts every subject's process; the floors are first.
fn start(config: &PageFault, sockets: &Path, source: &Source) -> Result<Vec<Box<dyn Subject>>> {
    let cpu = config.cpus.worker;
    let mut kinds = if config.evicted {
        vec![FloorKind::Disk]
    } else {
        FloorKind::BARE.to_vec()
    };
    if config.explain {
        kinds.extend(FloorKind::EXPLAINING);
    }
    let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
    for kind in kinds {
        subjects.push(Box::new(Floor::start(kind, sockets, source, cpu)?));
    }
    for engine in &config.engines {
        match engine {
            Engine::OursSpin => {
                let ours = Ours::start_waiting(50, 1, sockets, source, config.pages, cpu)?;
                subjects.push(Box::new(ours));
            }
            // One page per fault compares with the floor; the default is what is in use.
            Engine::Ours => {
                for window in [1, Ours::default_window()] {
                    let ours = Ours::start(window, sockets, source, config.pages, cpu)?;
                    subjects.push(Box::new(ours));
                }
            }
        }
    }
    for (name, path) in &config.peers {
        let peer = Peer::new(name, path, sockets, source.data(), cpu);
        subjects.push(Box::new(peer));
    }
    Ok(subjects)
}

struct Outcome {
    pass: Pass,
    faults: Option<u64>,
    pages_from_disk: u64,
}

fn one_round(
    subject: &mut dyn Subject,
    faulter: &mut Child,
    source: &Source,
    config: &PageFault,
    seed: u64,
) -> Result<Outcome> {
    let pages = config.pages;
    if config.evicted {
        source.evict()?;
    } else {
        source.keep_in_page_cache()?;
    }
    faulter.send(&Task::Prepare {
        socket: subject.expect()?,
        pages,
        seed,
        order: config.order,
        touches: pages,
        words: subject.words(),
    })?;
    match faulter.receive(PATIENCE)? {
        Answer::HandedOver => subject.attached()?,
        other => bail!("The faulter said {other:?} instead of handing over"),
    }
    faulter.send(&Task::Go)?;
    let Answer::Touched(pass) = faulter.receive(PASS_PATIENCE)? else {
        bail!("The faulter did not touch its memory");
    };
    let served = subject.detach()?;
    faulter.send(&Task::Release)?;
    let Answer::Released = faulter.receive(PATIENCE)? else {
        bail!("The faulter did not let go of its memory");
    };
    ensure!(
        pass.touch_ns.len() as u64 == pages,
        "The faulter touched {} of {pages} pages",
        pass.touch_ns.len()
    );
    // With a window of one page, a touch that was no fault was measured as one.
    ensure!(
        subject.window_pages() > 1 || served.faults.is_none_or(|faults| faults >= pages),
        "{pages} touches were only {:?} faults",
        served.faults
    );
    Ok(Outcome {
        pass,
        faults: served.faults,
        pages_from_disk: served.pages_from_disk,
    })
}

/// One subject's results as they come in.
struct Measured {
    name: String,
    window_pages: u64,
    all: Latencies,
    rounds: Vec<RoundReport>,
}

impl Measured {
    fn new(subject: &dyn Subject) -> Self {
        Self {
            name: subject.name().to_owned(),
            window_pages: subject.window_pages(),
            all: Latencies::new(),
            rounds: Vec::new(),
        }
    }

    /// The first `counted` touches are those that count.
    fn add(&mut self, outcome: &Outcome, counted: usize) -> Result<()> {
        let touches = &outcome.pass.touch_ns[..counted];
        let latencies = Latencies::of(touches);
        self.all.add(&latencies)?;
        let pass_ns = if counted == outcome.pass.touch_ns.len() {
            outcome.pass.total_ns
        } else {
            touches.iter().copied().map(u64::from).sum()
        };
        self.rounds.push(RoundReport {
            fault_us: (self.window_pages == 1).then(|| latencies.percentiles()),
            pass_us_per_page: pass_ns as f64 / 1000.0 / counted as f64,
            faults: outcome.faults,
            pages_from_disk: outcome.pages_from_disk,
        });
        Ok(())
    }

    fn finish(self) -> SubjectReport {
        SubjectReport {
            fault_us: (self.window_pages == 1).then(|| self.all.percentiles()),
            name: self.name,
            window_pages: self.window_pages,
            rounds: self.rounds,
        }
    }
}

fn setup(config: &PageFault) -> Setup {
    Setup {
        closed_loop: "closed loop, one outstanding fault",
        source: if config.evicted {
            "cold: build dropped from the page cache before each pass"
        } else {
            "warm: build in the page cache"
        },
        vmm: "none, a process plays it",
        order: config.order,
        seed: config.seed,
        page_bytes: PAGE_BYTES,
        rounds: config.rounds,
        warm_up_rounds: WARM_UP_ROUNDS,
        touches_per_round: order::counted(config.order, config.pages),
        cpus: config.cpus,
    }
}
