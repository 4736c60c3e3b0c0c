//! One pass over a working set, in the order in which it was recorded: when all of it is there,
//! when nothing is, when it is being replayed, and when a wrong set is.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Result, ensure};
use uffd_engine::control::{Report, Request};
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};
use uffd_engine::vmm_side::GuestMemory;

use super::{Faulter, publish};
use crate::args::Order;
use crate::config::{Ahead, PAGE_BYTES};
use crate::faulter::recycle;
use crate::order;
use crate::placement;
use crate::report::parts::{Bound, Part};
use crate::source::Source;
use crate::subject::ours::Ours;
use crate::sys::copy_page::copy_pages;
use crate::sys::page_source::PageSource;
use crate::workload::rounds::{Way, interleaved};

/// Runs of pages, as guests touch them.
const ORDER: Order = Order::Runs;

/// What is replayed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Set {
    None,
    Right,
    Wrong,
}

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &Ahead) -> Result<()> {
    let source = Source::write(&config.dir, config.pages)?;
    let sockets = tempfile::tempdir()?;
    let window = Ours::default_window();
    let ours = Ours::start(
        window,
        sockets.path(),
        &source,
        config.pages,
        config.cpus.worker,
    )?;
    let bench = RefCell::new(Bench {
        ours,
        faulter: Faulter::start(config)?,
        mapped: PageSource::mapped(&File::open(source.data())?)?,
        source: &source,
        config,
    });
    placement::pin(config.cpus.worker)?;
    let bench = &bench;
    let way = |set| move || bench.borrow_mut().pass(set).map(|(cold, _)| cold);
    let ways: Vec<Way<'_>> = vec![
        (
            "resident + bare copy".to_owned(),
            Box::new(|| {
                let mut bench = bench.borrow_mut();
                let (_, resident) = bench.pass(Set::None)?;
                Ok(resident + bench.copy()?)
            }),
        ),
        ("no replay".to_owned(), Box::new(way(Set::None))),
        ("right set".to_owned(), Box::new(way(Set::Right))),
        ("wrong set".to_owned(), Box::new(way(Set::Wrong))),
    ];
    let samples = interleaved(config.rounds, ways)?;
    let about = format!(
        "one pass over {} pages of {}, closed loop",
        config.pages / 4,
        config.pages
    );
    let part = Part::new("replay", about, "ms", samples)
        .ratio("right set", "resident + bare copy")
        .ratio_goal(Bound::AtMost(1.05))
        .ratio("wrong set", "no replay")
        .ratio_goal(Bound::AtMost(1.02))
        .ratio("right set", "no replay");
    publish("replay", config, &source, vec![part])
}

struct Bench<'a> {
    ours: Ours,
    faulter: Faulter,
    mapped: PageSource,
    source: &'a Source,
    config: &'a Ahead,
}

impl Bench<'_> {
    /// The pages that are touched, in their order, and as many that are not.
    fn sets(&self) -> (Vec<u64>, Vec<u64>) {
        let touches = (self.config.pages / 4) as usize;
        let order = order::ordered(ORDER, self.config.pages, self.config.seed);
        (
            order[..touches].to_vec(),
            order[touches..2 * touches].to_vec(),
        )
    }

    /// The first and the second pass over a session's working set, in milliseconds.
    fn pass(&mut self, set: Set) -> Result<(f64, f64)> {
        self.source.keep_in_page_cache()?;
        let (right, wrong) = self.sets();
        self.source.write_working_set(match set {
            Set::None => &[],
            Set::Right => &right,
            Set::Wrong => &wrong,
        })?;
        let (pages, seed) = (self.config.pages, self.config.seed);
        self.faulter
            .attach(&mut self.ours, pages, ORDER, right.len() as u64, seed)?;
        if set != Set::None {
            let answer = self
                .ours
                .ask(|request, session| Request::Replay { request, session })?;
            ensure!(
                matches!(answer, Report::Stats { .. }),
                "The engine said {answer:?}"
            );
        }
        let cold = self.faulter.touch()?.total_ns as f64 / 1e6;
        let resident = self.faulter.touch()?.total_ns as f64 / 1e6;
        let stats = self.ours.end()?;
        self.faulter.release()?;
        let replayed: u64 = stats.iter().map(|stats| stats.pages_replayed).sum();
        ensure!(
            (replayed > 0) == (set != Set::None),
            "{replayed} pages were replayed"
        );
        Ok((cold, resident))
    }

    /// Copies the working set's pages into this process's own memory, run by run.
    fn copy(&mut self) -> Result<f64> {
        let (right, _) = self.sets();
        recycle(right.len() as u64)?;
        let memory = GuestMemory::anonymous(self.config.pages * PAGE_BYTES)?;
        let uffd = Uffd::create(FEATURE_EVENT_REMOVE)?;
        memory.register(&uffd)?;
        let begun = Instant::now();
        for run in right.chunk_by(|page, next| page + 1 == *next) {
            let (first, bytes) = (run[0], run.len() as u64 * PAGE_BYTES);
            let address = memory.base().get() + first * PAGE_BYTES;
            copy_pages(uffd.as_fd(), address, self.mapped.page(first)?, bytes)?;
        }
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }
}
