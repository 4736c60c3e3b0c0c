//! Where a worker is best placed and how it is best to wait, measured on this host: the engine
//! itself serves a thread that touches memory, on its own core and on another.
//!
//! Placement is worth more than anything else. A fault that is answered on the core it happened
//! on costs two switches between threads; on another core it costs waking that core twice, which
//! on a virtual machine is mostly its hypervisor's work.

use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::server::{EngineOptions, pin};
use crate::standalone::{Standalone, StandaloneError};
use crate::sys::mapping::CACHE_PAGE;
use crate::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};
use crate::vmm_side::{self, GuestMemory};
use crate::worker::{Waiting, WorkerOptions};

/// Faults of one measurement: some milliseconds.
const FAULTS: u64 = 512;
/// How long a worker that spins does, where that is tried.
const SPIN_US: u64 = 50;
/// What another way has to save to be chosen: less is noise, and waiting in the kernel on any
/// core costs nobody else anything.
const WORTH: f64 = 0.9;

/// Where a fault happens, seen from its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// On the worker's core.
    SameCore,
    /// On another.
    OtherCore,
}

/// One way, and what it came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// Where.
    pub placement: Placement,
    /// How.
    pub waiting: Waiting,
    /// A fault's median, microseconds.
    pub p50_us: f64,
}

/// All that was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// Each way that this host has.
    pub figures: Vec<Figure>,
}

impl Calibration {
    /// Measures on these CPUs, the first of which gets the worker. Takes a tenth of a second, and
    /// needs a directory for a socket.
    ///
    /// # Errors
    /// There is no CPU, no userfaultfd, or no memory.
    pub fn measure(cpus: &[usize], dir: &Path) -> io::Result<Self> {
        let [worker, others @ ..] = cpus else {
            return Err(io::Error::other("no CPU to measure on"));
        };
        let source = source()?;
        let mut figures = Vec::new();
        for (placement, cpu) in [
            (Placement::SameCore, Some(worker)),
            (Placement::OtherCore, others.first()),
        ] {
            let Some(cpu) = cpu else { continue };
            for waiting in [Waiting::Block, Waiting::Spin { us: SPIN_US }] {
                figures.push(Figure {
                    placement,
                    waiting,
                    p50_us: median_fault(&source, dir, *worker, *cpu, waiting)?,
                });
            }
        }
        Ok(Self { figures })
    }

    /// How workers are to wait: spinning has to pay wherever a guest may run.
    #[must_use]
    pub fn waiting(&self) -> Waiting {
        let spins = |figure: &&Figure| figure.waiting != Waiting::Block;
        let pays = |figure: &Figure| {
            let blocks = self.of(figure.placement, Waiting::Block);
            blocks.is_some_and(|blocks| figure.p50_us < WORTH * blocks)
        };
        let mut spinning = self.figures.iter().filter(spins).peekable();
        match spinning.peek().copied() {
            Some(figure) if spinning.all(pays) => figure.waiting,
            _ => Waiting::Block,
        }
    }

    /// Whether a guest's thread gains by running on its worker's core.
    #[must_use]
    pub fn same_core_pays(&self) -> bool {
        let waiting = self.waiting();
        let same = self.of(Placement::SameCore, waiting);
        let other = self.of(Placement::OtherCore, waiting);
        matches!((same, other), (Some(same), Some(other)) if same < WORTH * other)
    }

    fn of(&self, placement: Placement, waiting: Waiting) -> Option<f64> {
        let is_it = |figure: &&Figure| figure.placement == placement && figure.waiting == waiting;
        Some(self.figures.iter().find(is_it)?.p50_us)
    }
}

impl Display for Calibration {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (index, figure) in self.figures.iter().enumerate() {
            let placement = match figure.placement {
                Placement::SameCore => "worker's core",
                Placement::OtherCore => "another core",
            };
            let waiting = match figure.waiting {
                Waiting::Block => "blocking".to_owned(),
                Waiting::Spin { us } => format!("spinning {us} µs"),
            };
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{placement} {waiting} {:.1} µs", figure.p50_us)?;
        }
        Ok(())
    }
}

/// A memory file without a file system.
fn source() -> io::Result<File> {
    let file = File::from(memfd_create(c"thaw-calibration", MFdFlags::MFD_CLOEXEC)?);
    file.write_all_at(&vec![1; (FAULTS * CACHE_PAGE) as usize], 0)?;
    Ok(file)
}

fn median_fault(
    source: &File,
    dir: &Path,
    worker: usize,
    cpu: usize,
    waiting: Waiting,
) -> io::Result<f64> {
    let options = EngineOptions {
        cpus: vec![worker],
        worker: WorkerOptions {
            waiting,
            // Every touch is a fault.
            window_pages: 1,
            ..WorkerOptions::default()
        },
        ..EngineOptions::default()
    };
    let socket = dir.join("calibration.sock");
    let path = format!("/proc/self/fd/{}", source.as_raw_fd());
    let other = |error: StandaloneError| io::Error::other(crate::chain(&error));
    let mut engine = Standalone::start(&socket, Path::new(&path), None, options).map_err(other)?;
    let touch = || {
        pin(Some(cpu))?;
        let memory = GuestMemory::anonymous(FAULTS * CACHE_PAGE)?;
        let uffd = Uffd::create(FEATURE_EVENT_REMOVE)?;
        memory.register(&uffd)?;
        let _connection = vmm_side::hand_off(&socket, &uffd, &[memory.as_region()])?;
        let mut ns: Vec<u128> = (0..FAULTS)
            .map(|page| {
                let begun = Instant::now();
                let _ = memory.read(page * CACHE_PAGE);
                begun.elapsed().as_nanos()
            })
            .collect();
        ns.sort_unstable();
        Ok(ns[ns.len() / 2] as f64 / 1e3)
    };
    // A thread of its own, because it is pinned.
    let median = std::thread::scope(|scope| scope.spawn(touch).join());
    let median = median.unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
    engine.wait().map_err(other)?;
    let _ = std::fs::remove_file(&socket);
    median
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calibration(figures: [(Placement, u64, f64); 4]) -> Calibration {
        let figure = |(placement, us, p50_us)| Figure {
            placement,
            waiting: Waiting::spinning(us),
            p50_us,
        };
        Calibration {
            figures: figures.map(figure).into(),
        }
    }

    #[test]
    fn a_way_is_chosen_only_if_it_is_worth_it() {
        use Placement::{OtherCore, SameCore};
        let virtual_machine = calibration([
            (SameCore, 0, 13.0),
            (SameCore, 50, 13.2),
            (OtherCore, 0, 60.0),
            (OtherCore, 50, 20.0),
        ]);
        // Spinning helps from another core, and not where it is best to be.
        assert_eq!(virtual_machine.waiting(), Waiting::Block);
        assert!(virtual_machine.same_core_pays());
        let metal = calibration([
            (SameCore, 0, 5.0),
            (SameCore, 50, 4.0),
            (OtherCore, 0, 5.2),
            (OtherCore, 50, 3.0),
        ]);
        assert_eq!(metal.waiting(), Waiting::Spin { us: 50 });
        assert!(!metal.same_core_pays());
        let nothing = Calibration { figures: vec![] };
        assert_eq!(nothing.waiting(), Waiting::Block);
        assert!(!nothing.same_core_pays());
    }

    #[test]
    fn this_host_can_be_measured() {
        let dir = tempfile::tempdir().unwrap();
        if let Err(error) = Uffd::create(FEATURE_EVENT_REMOVE) {
            println!("skipped: this_host_can_be_measured: no userfaultfd: {error}");
            return;
        }
        let set = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
        let cpus: Vec<usize> = (0..nix::sched::CpuSet::count())
            .filter(|cpu| set.is_set(*cpu).unwrap())
            .collect();
        let found = Calibration::measure(&cpus, dir.path()).unwrap();
        assert_eq!(found.figures.len(), if cpus.len() > 1 { 4 } else { 2 });
        assert!(found.figures.iter().all(|figure| figure.p50_us > 0.0));
        assert!(found.to_string().contains("worker's core blocking"));
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
    }
}
