//! What many sessions cost: the same number of touches over 1, 8 and 32 of them, the CPU of a
//! fault with 1 and 64, and what sessions cost that do nothing.

use std::cell::RefCell;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{Faulter, death, publish};
use crate::args::Order;
use crate::config::Ahead;
use crate::report::latency::Latencies;
use crate::report::parts::{Bound, Part};
use crate::source::Source;
use crate::subject::Subject;
use crate::subject::ours::Ours;
use crate::workload::rounds::{Way, interleaved};

const COUNTS: [u64; 4] = [1, 8, 32, 64];
/// Pages of an idle session: its page table costs nothing beside it.
const IDLE_PAGES: u64 = 16;
/// How long idleness is watched.
const IDLE: Duration = Duration::from_secs(2);

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &Ahead) -> Result<()> {
    // Every session has a userfaultfd, a pidfd, a table and a socket, on both sides.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let sockets = tempfile::tempdir()?;
    let faulter = RefCell::new(Faulter::start(config)?);
    let mut loads = Vec::new();
    for count in COUNTS {
        let dir = sockets.path().join(count.to_string());
        fs::create_dir(&dir)?;
        let pages = config.pages / count;
        let source = Source::write(&config.dir, pages)?;
        let ours = Ours::start(1, &dir, &source, pages, config.cpus.worker)?;
        loads.push(Load {
            count,
            pages,
            source,
            ours: RefCell::new(ours),
            cpu_us: RefCell::new(Vec::new()),
        });
    }
    let mut ways: Vec<Way<'_>> = Vec::new();
    for load in &loads {
        let faulter = &faulter;
        let way = move || load.round(&mut faulter.borrow_mut(), config.seed);
        ways.push((load.name(), Box::new(way)));
    }
    let samples = interleaved(config.rounds, ways)?;
    let faults = Part::new("fault", "median fault, equal total load", "µs", samples)
        .ratio("32 sessions", "1 session")
        .ratio_goal(Bound::AtMost(1.3));
    let cpu = loads.iter().map(|load| {
        // The round that doesn't count was the first.
        (load.name(), load.cpu_us.borrow()[1..].to_vec())
    });
    let cpu = Part::new("cpu", "the engine's CPU per fault", "µs", cpu.collect())
        .ratio("64 sessions", "1 session")
        .ratio_goal(Bound::AtMost(1.2));
    let idle = idle(config, &mut faulter.borrow_mut())?;
    publish(
        "sessions",
        config,
        &loads[0].source,
        [vec![faults, cpu], idle, vec![death::measure(config)?]].concat(),
    )
}

struct Load {
    count: u64,
    pages: u64,
    source: Source,
    ours: RefCell<Ours>,
    cpu_us: RefCell<Vec<f64>>,
}

impl Load {
    fn name(&self) -> String {
        let plural = if self.count == 1 { "" } else { "s" };
        format!("{} session{plural}", self.count)
    }

    /// Touches every page of every session; the median, in microseconds.
    fn round(&self, faulter: &mut Faulter, seed: u64) -> Result<f64> {
        self.source.keep_in_page_cache()?;
        let ours = &mut *self.ours.borrow_mut();
        for session in 0..self.count {
            faulter.attach(ours, self.pages, Order::Random, self.pages, seed + session)?;
        }
        let before = cpu_ns(ours.pid())?;
        let pass = faulter.touch()?;
        let took = cpu_ns(ours.pid())? - before;
        let served = ours.detach()?;
        faulter.release()?;
        let faults = served.faults.context("An engine counts")?;
        ensure!(faults >= self.pages * self.count, "Only {faults} faults");
        self.cpu_us
            .borrow_mut()
            .push(took as f64 / 1e3 / faults as f64);
        Ok(Latencies::of(&pass.touch_ns).percentiles().p50)
    }
}

/// Memory and CPU of sessions that nobody touches.
fn idle(config: &Ahead, faulter: &mut Faulter) -> Result<Vec<Part>> {
    let sockets = tempfile::tempdir()?;
    let source = Source::write(&config.dir, IDLE_PAGES)?;
    let window = Ours::default_window();
    let mut ours = Ours::start(
        window,
        sockets.path(),
        &source,
        IDLE_PAGES,
        config.cpus.worker,
    )?;
    let attach = |ours: &mut Ours, faulter: &mut Faulter| {
        faulter.attach(ours, IDLE_PAGES, Order::Random, 1, 1)
    };
    attach(&mut ours, faulter)?;
    let before = private_bytes(ours.pid())?;
    for _ in 0..config.idle {
        attach(&mut ours, faulter)?;
    }
    let each = (private_bytes(ours.pid())? as f64 - before as f64) / config.idle as f64 / 1024.0;
    let cpu = cpu_ns(ours.pid())?;
    std::thread::sleep(IDLE);
    let cpu = (cpu_ns(ours.pid())? - cpu) as f64 / IDLE.as_nanos() as f64 * 100.0;
    ours.end()?;
    faulter.release()?;
    let name = format!("{} idle sessions", config.idle);
    let memory = Part::new(
        "memory",
        "the engine's own memory per idle session",
        "KiB",
        vec![(name.clone(), vec![each])],
    );
    let part = Part::new(
        "idle",
        "the engine's CPU with nothing to do, of one core",
        "%",
        vec![(name.clone(), vec![cpu])],
    );
    Ok(vec![
        memory.goal(&name, Bound::AtMost(64.0)),
        part.goal(&name, Bound::AtMost(0.0)),
    ])
}

/// Time that all threads of a process have spent on a CPU.
fn cpu_ns(pid: u32) -> Result<u64> {
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat"))?;
        let ns = text.split(' ').next().context("An empty schedstat")?;
        total += ns.parse::<u64>()?;
    }
    Ok(total)
}

/// Memory that only this process has.
fn private_bytes(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let private = text.lines().filter(|line| line.starts_with("Private_"));
    let kib = private.filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok());
    Ok(kib.sum::<u64>() * 1024)
}
