//! How a worker is set up: its read slots, its window, and how it waits.

/// How a worker is set up.
#[derive(Clone, Copy, Debug)]
pub struct WorkerOptions {
    /// Reads in flight at most.
    pub read_slots: usize,
    /// How a worker waits.
    pub waiting: Waiting,
    /// The most pages installed around a fault whose content is at hand; a power of two.
    pub window_pages: u64,
}

/// How a worker waits for the next fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Waiting {
    /// In the kernel, for anything: nothing is spent on waiting.
    #[default]
    Block,
    /// After a fault, asks its session again for this long, and yields the core in between.
    /// Saves a system call and a wake-up per fault, and costs up to this much CPU after each.
    Spin {
        /// Microseconds; [`Waiting::Block`] is better than 0.
        us: u64,
    },
}

impl Waiting {
    /// Spins for so many microseconds; not at all for 0.
    #[must_use]
    pub const fn spinning(us: u64) -> Self {
        match us {
            0 => Self::Block,
            us => Self::Spin { us },
        }
    }
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            read_slots: 64,
            waiting: Waiting::Block,
            window_pages: 16,
        }
    }
}
