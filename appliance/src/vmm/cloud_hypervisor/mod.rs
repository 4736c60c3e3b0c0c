//! Cloud Hypervisor, unmodified, from version 52 on: driven over its API, its memory handed out and
//! in by its local migration protocol, its seccomp filters and Landlock on.
//!
//! ```text
//!   boot      vm.create, vm.boot
//!   pause     vm.pause, vm.send-migration ─▶ memfds, configuration, state; the last answer when
//!             the build is there: to go on, or none at all
//!   restore   vm.receive-migration {Postcopy} ◀─ empty memfd, configuration, state;
//!             page requests ─▶ engine
//! ```
//!
//! It asks for all of its memory, page by page, while the guest runs, and lets nobody take the
//! guest before it has it: a pause soon after a resume waits for that. Where it can't ask, it reads
//! pages out of a file of its own ([`Paging::Own`]); which way it is, is tried out at start.
//!
//! A guest isn't told that it is a clone (there is no VMGenID): `envd` is, whenever a guest comes
//! back, before anything else gets to it.

mod bodies;
mod channel;
mod command;
mod events;
mod layout;
mod machine;
mod own;
pub mod probe;
pub mod probe_guest;
pub mod protocol;
mod receive;
mod send;
mod state;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use http_api::wire::VmmInfo;
use tokio::sync::oneshot;
use uffd_engine::Tracking;

pub use events::{Decoder, Event};
pub use layout::{Layout, Mapping};
pub use state::{Contents, StateError};

use self::command::Layout as Paths;
use self::machine::{CloudHypervisorMachine, Start};
use self::receive::Release;
use super::{
    DiskLimits, Driver, GuestShape, Machine, Paging, Place, Restore, VmmError, kernel_image,
};

/// The driver.
#[derive(Clone, Debug)]
pub struct CloudHypervisor {
    program: PathBuf,
    info: VmmInfo,
    state_format: String,
    paging: Paging,
    release: Release,
    landlock: bool,
    /// How long it may take for one command.
    patience: Duration,
    /// Where unpacked kernels are kept.
    kernels: PathBuf,
    disk_limits: DiskLimits,
}

impl CloudHypervisor {
    /// The same one, its guests' disks as fast as this.
    #[must_use]
    pub fn with_disk_limits(mut self, limits: DiskLimits) -> Self {
        self.disk_limits = limits;
        self
    }

    /// The same one, with one reason more for its choice.
    #[must_use]
    pub fn because(mut self, reason: &str) -> Self {
        self.info.reason = format!("{}; {reason}", self.info.reason);
        self
    }
}

#[async_trait]
impl Driver for CloudHypervisor {
    fn info(&self) -> &VmmInfo {
        &self.info
    }

    fn state_format(&self) -> &str {
        &self.state_format
    }

    fn paging(&self) -> Paging {
        self.paging
    }

    /// It maps pages itself: what changed is found by comparison.
    fn tracking(&self) -> Tracking {
        Tracking::Off
    }

    fn handoff(&self, place: &Place) -> io::Result<PathBuf> {
        let paths = Paths::new(&place.run_dir);
        if self.paging == Paging::Own {
            fs::create_dir_all(paths.own())?;
            return Ok(paths.own_memory());
        }
        fs::create_dir_all(&paths.dir)?;
        Ok(paths.give())
    }

    async fn boot(&self, shape: &GuestShape, place: &Place) -> Result<Box<dyn Machine>, VmmError> {
        let kernel = kernel_image::unpacked(&place.name, &shape.kernel, &self.kernels).await?;
        let start = Start {
            name: &place.name,
            paths: &Paths::new(&place.run_dir),
            place: Some(place),
            memory_bytes: shape.memory_bytes(),
        };
        let mut machine = CloudHypervisorMachine::start(self, start).await?;
        machine
            .boot(shape, kernel, Some(place), self.landlock)
            .await?;
        Ok(Box::new(machine))
    }

    async fn restore(
        &self,
        shape: &GuestShape,
        place: &Place,
        restore: Restore<'_>,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let contents = Contents::unpack(&restore.state).map_err(|source| VmmError::State {
            name: place.name.clone(),
            source,
        })?;
        let start = Start {
            name: &place.name,
            paths: &Paths::new(&place.run_dir),
            place: Some(place),
            memory_bytes: shape.memory_bytes(),
        };
        let mut machine = CloudHypervisorMachine::start(self, start).await?;
        if self.paging == Paging::Own {
            machine
                .restore_own(&contents, self.landlock, restore.run)
                .await?;
        } else {
            // Without anybody to serve them, the requests have no way to go, and that is an error.
            let asks = restore.asks.unwrap_or_else(|| oneshot::channel().0);
            machine
                .give(&contents, self.landlock, restore.run, asks)
                .await?;
        }
        Ok(Box::new(machine))
    }
}
