//! VMMs that are started before anybody needs them.
//!
//! ```text
//!   a slot waits ──▶ Prepares::prepare ──▶ Prepared ──▶ Prepared::restore ──▶ Machine
//!                    process, namespaces,     │         disk, device state,
//!                    open API                 ▼         memory
//!                                           ended: nobody came, or it died
//! ```
//!
//! What waits has no guest, no disk and no memory; a build's disk is shown to it when it is
//! claimed. A VMM that has a build loaded already would be another thing.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use async_trait::async_trait;

use super::cgroup::Cgroup;
use super::{GuestShape, Machine, Place, Restore, VmmError};

/// Where a VMM can wait: a slot that is built and nobody's, or a paused sandbox's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Berth {
    /// The slot's number.
    pub slot: u32,
    /// A directory of its own, which becomes the sandbox's by a new name.
    pub run_dir: PathBuf,
    /// The network namespace it waits in.
    pub namespace: PathBuf,
    /// The control group that it is born in, if there is one.
    pub cgroup: Option<Cgroup>,
}

impl Berth {
    /// For messages, instead of a sandbox's.
    #[must_use]
    pub fn name(&self) -> String {
        format!("slot {}", self.slot)
    }
}

/// A driver whose VMMs can wait.
#[async_trait]
pub trait Prepares: Send + Sync {
    /// Starts a VMM for a guest that is to come.
    ///
    /// # Errors
    /// Nothing of it is left but its directory.
    async fn prepare(&self, berth: &Berth) -> Result<Box<dyn Prepared>, VmmError>;
}

/// A VMM process that waits for a guest. It belongs to no runtime: who prepares it and who claims it
/// have different ones. Dropping it ends the process.
#[async_trait]
pub trait Prepared: Send {
    /// Becomes readable when the process ends.
    fn pidfd(&self) -> BorrowedFd<'_>;

    /// Starts a guest in it from a device state, as [`Driver::restore`](super::Driver::restore)
    /// would; `place` is of its slot, and its directory has been given the place's name.
    ///
    /// # Errors
    /// Nothing of it is left.
    async fn restore(
        self: Box<Self>,
        shape: &GuestShape,
        place: &Place,
        restore: Restore<'_>,
    ) -> Result<Box<dyn Machine>, VmmError>;
}
