//! How fast all of a memory is loaded: the engine's loader beside bare `UFFDIO_COPY` loops of
//! several batch sizes, on the same core, from the page cache.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use uffd_engine::control::{Report, Request};
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};
use uffd_engine::vmm_side::GuestMemory;

use super::{Faulter, publish, shared};
use crate::args::Order;
use crate::config::{Ahead, PAGE_BYTES};
use crate::faulter::recycle;
use crate::placement;
use crate::report::parts::{Bound, Part};
use crate::source::Source;
use crate::subject::Subject;
use crate::subject::ours::Ours;
use crate::sys::copy_page::copy_pages;
use crate::sys::page_source::PageSource;
use crate::workload::rounds::{Way, interleaved};

/// Pages of one copy.
const BATCHES: [u64; 5] = [1, 4, 16, 64, 256];

/// As new as the engine's mapping of a build is when its first session comes.
const NEW_MAPPING: &str = "bare, 256 KiB, new mapping";
/// An engine that has not served this build before.
const FIRST: &str = "ours, a build's first session";

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &Ahead) -> Result<()> {
    let source = Source::write(&config.dir, config.pages)?;
    let sockets = tempfile::tempdir()?;
    let window = Ours::default_window();
    let mut ours = Ours::start(
        window,
        sockets.path(),
        &source,
        config.pages,
        config.cpus.worker,
    )?;
    let mut faulter = Faulter::start(config)?;
    placement::pin(config.cpus.worker)?;
    let mapped = RefCell::new(PageSource::mapped(&File::open(source.data())?)?);

    let (path, pages) = (source.data(), config.pages);
    let mut first_faulter = Faulter::start(config)?;
    let first_source = &source;
    let first = || {
        first_source.keep_in_page_cache()?;
        let cpu = config.cpus.worker;
        let sockets = tempfile::tempdir()?;
        let mut ours = Ours::start(window, sockets.path(), first_source, pages, cpu)?;
        load(&mut ours, &mut first_faulter, config)
    };
    let mut ways: Vec<Way<'_>> = Vec::new();
    for batch in BATCHES {
        let (mapped, source) = (&mapped, &source);
        let way = move || {
            source.keep_in_page_cache()?;
            bare(&mut mapped.borrow_mut(), config.pages, batch)
        };
        ways.push((format!("bare, {} KiB", batch * 4), Box::new(way)));
    }
    let new_mapping = || {
        source.keep_in_page_cache()?;
        bare(&mut PageSource::mapped(&File::open(path)?)?, pages, 64)
    };
    ways.push((NEW_MAPPING.to_owned(), Box::new(new_mapping)));
    ways.push((
        "ours".to_owned(),
        Box::new(|| {
            source.keep_in_page_cache()?;
            load(&mut ours, &mut faulter, config)
        }),
    ));
    ways.push((FIRST.to_owned(), Box::new(first)));
    let samples = interleaved(config.rounds, ways)?;
    let part = Part::new("populate", "all of the memory", "GB/s", samples);
    let best = part.subjects[..BATCHES.len()]
        .iter()
        .max_by(|a, b| a.median.total_cmp(&b.median))
        .context("There is no batch")?
        .name
        .clone();
    let part = part
        .ratio("ours", &best)
        .ratio_goal(Bound::AtLeast(0.9))
        .ratio(FIRST, &best)
        .ratio(FIRST, NEW_MAPPING);
    let shared = shared::measure(config, &source)?;
    publish("populate", config, &source, vec![part, shared])
}

pub(super) fn gb_per_second(pages: u64, took: Duration) -> f64 {
    (pages * PAGE_BYTES) as f64 / 1e9 / took.as_secs_f64()
}

/// Copies everything in this process's own memory, in order.
fn bare(source: &mut PageSource, pages: u64, batch: u64) -> Result<f64> {
    recycle(pages)?;
    let memory = GuestMemory::anonymous(pages * PAGE_BYTES)?;
    let uffd = Uffd::create(FEATURE_EVENT_REMOVE)?;
    memory.register(&uffd)?;
    let begun = Instant::now();
    for page in (0..pages).step_by(batch as usize) {
        let bytes = batch.min(pages - page) * PAGE_BYTES;
        let address = memory.base().get() + page * PAGE_BYTES;
        copy_pages(uffd.as_fd(), address, source.page(page)?, bytes)?;
    }
    Ok(gb_per_second(pages, begun.elapsed()))
}

/// Has the engine load everything.
fn load(ours: &mut Ours, faulter: &mut Faulter, config: &Ahead) -> Result<f64> {
    faulter.attach(
        ours,
        config.pages,
        Order::Sequential,
        config.pages,
        config.seed,
    )?;
    let begun = Instant::now();
    let answer = ours.ask(|request, session| Request::Load {
        request,
        session,
        bytes_per_second: u64::MAX,
    })?;
    ensure!(
        matches!(answer, Report::Stats { .. }),
        "The engine said {answer:?}"
    );
    ours.wait_loaded()?;
    let took = begun.elapsed();
    // Every page is there, and the build's.
    faulter.touch()?;
    let served = ours.detach()?;
    faulter.release()?;
    ensure!(
        served.faults == Some(0),
        "Loaded memory faulted: {served:?}"
    );
    Ok(gb_per_second(config.pages, took))
}
