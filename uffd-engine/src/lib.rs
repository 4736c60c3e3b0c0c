//! The page-fault engine: serves the memory of restored microVMs from snapshot
//! builds, one page at a time, as the guest touches it.
//!
//! ```text
//!  uffd readable ─▶ read ≤ 64 events ─▶ REMOVEs first ─▶ page state ─▶ extent
//!                                                                       │
//!            zero extent ─▶ ZEROPAGE        in the page cache ─▶ COPY ◀─┤
//!                                    else ─▶ io_uring O_DIRECT read ─▶ COPY on completion
//! ```
//!
//! Ahead of faults, when no session has any: replaying a recorded working set
//! ([`recording`]), loading all of a memory. Which pages a guest has written is known
//! exactly where its memory can be write-protected ([`dirty_set`]).
//!
//! An engine is a process of its own ([`server::run`]), one per NUMA node, driven by a
//! daemon over a socket ([`control`]). Its pinned workers share nothing. What must
//! survive an engine lives outside it: the page-state table is in memory that the daemon
//! holds too ([`page_state`]), and the daemon keeps a duplicate of every userfaultfd. What
//! must survive both is in a file of a tmpfs, and with the VMM.
//! Without a daemon it serves whoever comes to a socket ([`standalone`]). The second source
//! of faults are a Cloud Hypervisor's page requests ([`postcopy`]).
//!
//! # Architecture invariant
//! This crate knows neither HTTP nor any VMM's API, and no policy: which build, which
//! deadline and which CPU are told to it. It reads builds through `snapshot-format`
//! alone. Guest memory is never a Rust reference.

// In the order of one fault's life.
pub mod address;
pub mod handoff;
pub mod page_state;
pub mod region;
pub mod source;

mod fault_source;
mod plain_file;
mod residency;
mod resolve;
mod retry;
mod window;

pub mod counters;
mod data_files;
mod expecting;
mod read_jobs;
mod times;

mod background;
mod loader;
pub mod recording;
mod replay;

mod tracking;

pub mod postcopy;

mod install;
mod roster;
mod session;
mod worker;

pub mod calibration;
pub mod control;
mod outbox;
pub mod server;
pub mod standalone;

pub mod dirty;
pub mod dirty_set;
pub mod memory_image;
pub mod vmm_side;

pub mod sys;

pub use counters::SessionStats;
pub use page_state::{PageState, PageStates};
pub use times::Times;
pub use tracking::Tracking;
pub use worker::{Waiting, WorkerOptions};

#[cfg(test)]
mod kernel_model;

/// An error with all its causes, in one line, for a peer that gets only text.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
