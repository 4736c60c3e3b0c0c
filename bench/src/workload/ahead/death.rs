//! How long a session outlives its VMM, which is killed with all of its memory in use.

use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use uffd_engine::sys::process::pidfd_open;

use super::Faulter;
use crate::args::Order;
use crate::child::readable;
use crate::config::Ahead;
use crate::report::parts::{Bound, Part};
use crate::source::Source;
use crate::subject::PATIENCE;
use crate::subject::ours::Ours;

/// Pages of the memory that goes with the VMM: the kernel's part of its end grows with them.
const PAGES: u64 = 4096;

/// Kills a faulter per round, and notes when who knew.
pub(super) fn measure(config: &Ahead) -> Result<Part> {
    let sockets = tempfile::tempdir()?;
    let source = Source::write(&config.dir, PAGES)?;
    let window = Ours::default_window();
    let mut ours = Ours::start(window, sockets.path(), &source, PAGES, config.cpus.worker)?;
    let (mut kernel, mut engine, mut gone) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=config.rounds {
        let mut faulter = Faulter::start(config)?;
        faulter.attach(&mut ours, PAGES, Order::Random, PAGES, config.seed)?;
        faulter.touch()?;
        let pid = i32::try_from(faulter.0.pid())?;
        let pidfd = pidfd_open(pid).context("Watching the faulter")?;
        let begun = Instant::now();
        let elapsed_ms = || begun.elapsed().as_secs_f64() * 1e3;
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        readable(pidfd.as_fd(), PATIENCE)?;
        let ended = elapsed_ms();
        ours.wait_ended()?;
        let told = elapsed_ms();
        ours.end()?;
        let detached = elapsed_ms();
        if round > 0 {
            kernel.push(ended);
            engine.push(told);
            gone.push(detached);
        }
    }
    let about = "from SIGKILL for a VMM with 16 MiB in use, to who knows of it";
    let samples = vec![
        ("its pidfd is readable".to_owned(), kernel),
        ("its engine says so".to_owned(), engine),
        ("its session is gone".to_owned(), gone),
    ];
    Ok(Part::new("death", about, "ms", samples).goal("its session is gone", Bound::AtMost(10.0)))
}
