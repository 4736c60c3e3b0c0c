//! Faults beside something else: an engine and a process that touches memory, again and again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::args::Order;
use crate::config::Api;
use crate::source::Source;
use crate::subject::Subject as _;
use crate::subject::ours::Ours;
use crate::workload::ahead::Faulter;

/// The engine and who touches.
pub(super) struct Faults {
    ours: Ours,
    faulter: Faulter,
    source: Source,
    pages: u64,
    seed: u64,
    _sockets: TempDir,
}

impl Faults {
    /// Every touch is a fault.
    pub(super) fn start(config: &Api) -> Result<Self> {
        let sockets = tempfile::tempdir()?;
        let source = Source::write(&config.dir, config.pages)?;
        let cpus = config.cpus;
        Ok(Self {
            ours: Ours::start(1, sockets.path(), &source, config.pages, cpus.worker)?,
            faulter: Faulter::on(cpus.faulter)?,
            source,
            pages: config.pages,
            seed: config.seed,
            _sockets: sockets,
        })
    }

    /// What comes out of something while faults are served, and how many of those a millisecond.
    pub(super) fn during<T: Send>(
        &mut self,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<(T, f64)> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let stopping = &stop;
            let working = scope.spawn(move || {
                let done = work();
                stopping.store(true, Ordering::Release);
                done
            });
            let (began, mut faults) = (Instant::now(), 0);
            while !stop.load(Ordering::Acquire) {
                faults += self.pass()?;
            }
            let per_ms = faults as f64 / began.elapsed().as_secs_f64() / 1000.0;
            let done = working.join();
            let done = done.unwrap_or_else(|_| panic!("what is measured panicked"));
            Ok((done?, per_ms))
        })
    }

    /// Touches every page once.
    fn pass(&mut self) -> Result<u64> {
        self.source.keep_in_page_cache()?;
        self.seed += 1;
        self.faulter.attach(
            &mut self.ours,
            self.pages,
            Order::Random,
            self.pages,
            self.seed,
        )?;
        self.faulter.touch()?;
        let served = self.ours.detach()?;
        self.faulter.release()?;
        let faults = served.faults.context("An engine counts")?;
        ensure!(faults >= self.pages, "Only {faults} faults");
        Ok(faults)
    }
}
