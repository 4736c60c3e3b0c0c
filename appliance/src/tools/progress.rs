//! How far long work is.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Before that, nobody asks.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two lines where a line can't be replaced.
const INTERVAL: Duration = Duration::from_secs(10);

/// A line on standard error, from two seconds on: replaced on a terminal, repeated now and then in
/// a log.
#[derive(Debug)]
pub(super) struct Progress {
    started: Instant,
    shown: Option<Instant>,
    terminal: bool,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            shown: None,
            terminal: std::io::stderr().is_terminal(),
        }
    }
}

impl Progress {
    /// Says that `done` of `total` is done; a total of 0 is one that nobody knows.
    pub(super) fn show(&mut self, what: &dyn Display, done: u64, total: u64) {
        if self.started.elapsed() < PATIENCE {
            return;
        }
        let interval = if self.terminal {
            Duration::from_millis(100)
        } else {
            INTERVAL
        };
        if self.shown.is_some_and(|shown| shown.elapsed() < interval) {
            return;
        }
        self.shown = Some(Instant::now());
        let how_far = match total {
            0 => format!("{} MiB", done >> 20),
            total => format!(
                "{} %",
                (100 * u128::from(done) / u128::from(total)).min(100)
            ),
        };
        let mut stderr = std::io::stderr();
        // Progress that can't be shown is no reason to fail.
        let _ = if self.terminal {
            write!(stderr, "\r\x1b[K{what}: {how_far} ")
        } else {
            writeln!(stderr, "{what}: {how_far}")
        };
        let _ = stderr.flush();
    }

    /// Leaves the line to what comes next.
    pub(super) fn clear(&self) {
        if self.terminal && self.shown.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}
