//! The machine under us: its clock, its entropy, its name, its caches.
//!
//! In a sandbox the machine is ours. On somebody's workstation (a conformance test, development) it
//! is borrowed, and the same calls check their arguments but leave the machine as it is.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::sys::time::{TimeSpec, TimeValLike as _};
use nix::time::{ClockId, clock_gettime, clock_settime};

use crate::protocol::Timestamp;
use crate::sys;

/// A clock that is off by no more than this is left alone.
pub(crate) const CLOCK_TOLERANCE: Duration = Duration::from_millis(50);

/// How long to wait for quiet, how often to look for it, and how often in a row to see it.
const MAX_SETTLE: Duration = Duration::from_millis(200);
const LOOK: Duration = Duration::from_millis(5);
const QUIET_LOOKS: u32 = 3;

/// Whose machine it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// Ours: a sandbox.
    Owned,
    /// Somebody else's: change nothing.
    Borrowed,
}

impl Machine {
    /// Sets the clock if it is off by more than [`CLOCK_TOLERANCE`].
    pub(crate) fn step_clock(self, to: Timestamp) -> io::Result<()> {
        let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
        let target = TimeSpec::from_duration(to.since_epoch());
        if self == Machine::Owned && is_off(now, target) {
            clock_settime(ClockId::CLOCK_REALTIME, target)?;
        }
        Ok(())
    }

    /// Feeds and reseeds the kernel's random generator.
    pub(crate) fn add_entropy(self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Machine::Owned => sys::entropy::add(bytes),
            Machine::Borrowed => Ok(()),
        }
    }

    /// Renames the machine.
    pub(crate) fn set_hostname(self, name: &str) -> io::Result<()> {
        if self == Machine::Owned {
            nix::unistd::sethostname(name)?;
        }
        Ok(())
    }

    /// Writes everything back and drops clean page cache, so that a snapshot holds less. Blocks.
    pub(crate) fn flush(self) -> io::Result<()> {
        if self == Machine::Owned {
            nix::unistd::sync();
            std::fs::write("/proc/sys/vm/drop_caches", "1")?;
        }
        Ok(())
    }

    /// Discards free blocks, moves used pages together and waits for quiet; what can't be done, or
    /// not by then, is left out. Blocks.
    pub(crate) fn compact(self, until: Instant) {
        if self == Machine::Borrowed {
            return;
        }
        let steps: [fn(); 2] = [
            || {
                // Not every disk can.
                let root = File::open("/").and_then(|root| sys::trim::trim(root.as_fd()));
                let _ = root;
            },
            || {
                // Not in every kernel.
                let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
            },
        ];
        for step in steps {
            if Instant::now() < until {
                step();
            }
        }
        let give_up = until.min(Instant::now() + MAX_SETTLE);
        let mut quiet = 0;
        while quiet < QUIET_LOOKS && Instant::now() < give_up {
            let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
            quiet = if only_we_run(&stat) { quiet + 1 } else { 0 };
            std::thread::sleep(LOOK);
        }
    }
}

/// Whether no other task wants to run now, by the text of /proc/stat.
fn only_we_run(stat: &str) -> bool {
    let running = stat
        .lines()
        .find_map(|line| line.strip_prefix("procs_running "));
    running.is_some_and(|count| matches!(count.trim(), "0" | "1"))
}

fn is_off(now: TimeSpec, target: TimeSpec) -> bool {
    let nanos = (now - target).num_nanoseconds().unsigned_abs();
    u128::from(nanos) > CLOCK_TOLERANCE.as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_is_off_beyond_the_tolerance_in_either_direction() {
        let at = |millis: i64| TimeSpec::milliseconds(1_700_000_000_000 + millis);
        assert!(!is_off(at(0), at(0)));
        assert!(!is_off(at(0), at(50)));
        assert!(!is_off(at(0), at(-50)));
        assert!(is_off(at(0), at(51)));
        assert!(is_off(at(0), at(-51)));
        assert!(is_off(at(0), TimeSpec::seconds(0)));
    }

    #[test]
    fn machine_is_quiet_when_only_we_run() {
        assert!(only_we_run("cpu 1\nprocs_running 1\nprocs_blocked 0\n"));
        assert!(!only_we_run("cpu 1\nprocs_running 2\n"));
        assert!(!only_we_run("procs_running 10\n") && !only_we_run(""));
    }

    #[test]
    fn borrowed_machine_is_left_alone() {
        assert!(
            Machine::Borrowed
                .step_clock("1970-01-02T00:00:00Z".parse().unwrap())
                .is_ok()
        );
        assert!(Machine::Borrowed.set_hostname("not-mine").is_ok());
        assert_ne!(nix::unistd::gethostname().unwrap(), "not-mine");
    }
}
