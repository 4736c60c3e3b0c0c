//! What serves faults: a process that takes hand-offs at a socket.
//!
//! A subject is told to expect a session, is handed memory by the faulter, and is told to let
//! go. Everything it may do on the way is its own affair, which makes any handler that speaks
//! Firecracker's hand-off a subject.

pub(crate) mod floor;
pub(crate) mod ours;
pub(crate) mod peer;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::source::Words;

/// How long a process may take for anything that is not a round.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What a subject says it did in one session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Served {
    /// Fault events it read, if it says so.
    pub(crate) faults: Option<u64>,
    /// Pages that had to come from the disk: a round with any was not warm.
    pub(crate) pages_from_disk: u64,
}

/// Something that serves faults.
pub(crate) trait Subject {
    /// What reports call it.
    fn name(&self) -> &str;

    /// How many pages it installs for one fault.
    fn window_pages(&self) -> u64;

    /// What the pages it installs begin with.
    fn words(&self) -> Words;

    /// Gets ready for one more session; returns where to hand memory over.
    fn expect(&mut self) -> Result<PathBuf>;

    /// Waits until the memory that was handed over is being served.
    fn attached(&mut self) -> Result<()>;

    /// Ends all sessions, whose memory must still be there.
    fn detach(&mut self) -> Result<Served>;
}
