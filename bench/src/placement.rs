//! Which CPU each process of a run is pinned to.

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::Serialize;

use crate::args::Placement;

/// The CPUs of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Cpus {
    /// Of the process that touches memory.
    pub(crate) faulter: usize,
    /// Of the thread that serves it, whichever subject's turn it is.
    pub(crate) worker: usize,
}

/// The CPUs that this process may run on, ascending.
pub(crate) fn allowed() -> Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0)).context("Asking for the allowed CPUs")?;
    Ok((0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect())
}

/// The last allowed CPU, which gets the fewest of the host's interrupts, and for the worker
/// on another core the one before it.
pub(crate) fn choose(placement: Placement, allowed: &[usize]) -> Result<Cpus> {
    match (placement, allowed) {
        (Placement::Same, [.., last]) => Ok(Cpus {
            faulter: *last,
            worker: *last,
        }),
        (Placement::Other, [.., before, last]) => Ok(Cpus {
            faulter: *last,
            worker: *before,
        }),
        (Placement::Other, [only]) => {
            bail!("--placement other needs two CPUs, and this process may only use CPU {only}")
        }
        (_, []) => bail!("This process may use no CPU"),
    }
}

/// Pins the calling thread, and what it starts, to one CPU.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .with_context(|| {
            format!("Pinning to CPU {cpu} (unpinned numbers would mean nothing; see taskset -p)")
        })
}

/// Pins another process, and the threads that it starts from now on.
pub(crate) fn pin_process(pid: u32, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(pid.cast_signed()), &set))
        .with_context(|| format!("Pinning process {pid} to CPU {cpu}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_cores_are_refused_where_there_is_one() {
        let same = choose(Placement::Same, &[3]).unwrap();
        assert_eq!((same.faulter, same.worker), (3, 3));
        let other = choose(Placement::Other, &[0, 2, 5]).unwrap();
        assert_eq!((other.faulter, other.worker), (5, 2));
        assert!(choose(Placement::Other, &[3]).is_err());
    }
}
