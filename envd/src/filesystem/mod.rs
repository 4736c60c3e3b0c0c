//! Files of the guest: what clients ask of them, and the watches.
//!
//! ```text
//! service (Connect) ─▶ owner (whose home, who owns) ─▶ path (absolute, clean; pure)
//!                                                        │
//!   stat, list, make, move, remove ◀── place (a name in an open directory)
//!   watch ◀── listing (relative to the open root, never through a link)
//! ```
//!
//! The daemon works with its own rights, as the clients expect; the user decides where relative
//! paths start and who owns what is made. Whatever touches a disk runs beside the event loop, so a
//! disk that hangs, or is frozen for a snapshot, holds up nobody else.

mod entry;
mod error;
pub(crate) mod hidden;
mod listing;
mod metadata;
mod mount;
mod owner;
pub(crate) mod path;
mod place;
mod removal;
pub(crate) mod service;
mod transfer;
mod watch;

/// Operations as the service does them, for the fuzz targets.
#[cfg(fuzzing)]
pub(crate) mod fuzzing {
    use super::{GuestPath, listing, removal};

    /// The paths in a directory down to a depth.
    pub fn list(path: &str, depth: u32) -> Option<Vec<String>> {
        let path = GuestPath::resolve(path, "/").ok()?;
        let entries = listing::list(&path, depth, &crate::accounts::Names::default());
        Some(entries.ok()?.into_iter().map(|entry| entry.path).collect())
    }

    /// Removes what is at a path, if it can be.
    pub fn remove(path: &str) {
        if let Ok(path) = GuestPath::resolve(path, "/") {
            let _ = removal::remove(&path);
        }
    }
}

pub(crate) use error::FileError;
pub(crate) use metadata::{Metadata, checked as checked_metadata, write as write_metadata};
pub(crate) use owner::Owner;
pub(crate) use path::GuestPath;
pub(crate) use place::Place;
pub(crate) use watch::Collectors;
