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
//! pages out of a file of its own ([`Paging::Own`]), version 52 all of them before the guest goes on;
//! which way it is, is tried out at start.
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
mod prepared;
pub mod probe;
pub mod probe_guest;
pub mod protocol;
mod receive;
mod send;
mod state;
mod waiting;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use http_api::wire::VmmInfo;
use uffd_engine::Tracking;

pub use events::{Decoder, Event};
pub use layout::{Layout, Mapping};
pub use state::{Contents, StateError};

use self::bodies::FromFile;
use self::command::{Boot, Layout as Paths};
use self::machine::CloudHypervisorMachine;
use self::prepared::PreparedCloudHypervisor;
use self::receive::Release;
use self::waiting::Start;
use super::own_user::Users;
use super::prepared::{Berth, Prepared, Prepares};
use super::process::Survivor;
use super::{Driver, GuestShape, Machine, Paging, Place, Restore, VmmError, kernel_image};

/// The driver.
#[derive(Clone, Debug)]
pub struct CloudHypervisor {
    program: PathBuf,
    info: VmmInfo,
    state_format: String,
    paging: Paging,
    release: Release,
    /// With [`Paging::Own`].
    from_file: FromFile,
    landlock: bool,
    /// Who its VMMs are, if not the daemon's user.
    users: Option<Users>,
    /// How long it may take for one command.
    patience: Duration,
    /// Where unpacked kernels are kept.
    kernels: PathBuf,
}

impl CloudHypervisor {
    /// Who the VMM of a slot is, if not the daemon's user.
    fn user(&self, slot: u32) -> Option<u32> {
        self.users.map(|users| users.of(slot))
    }

    /// The same one, with one reason more for its choice.
    #[must_use]
    pub fn because(mut self, reason: &str) -> Self {
        self.info.reason = format!("{}; {reason}", self.info.reason);
        self
    }
}

/// What a build keeps of the guest with this name.
fn unpacked(name: &str, state: &[u8]) -> Result<Contents, VmmError> {
    Contents::unpack(state).map_err(|source| VmmError::State {
        name: name.to_owned(),
        source,
    })
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
            place: Some(place.into()),
            boot: Some(Boot {
                kernel: &kernel,
                initrd: Some(&shape.initrd),
            }),
        };
        let memory = shape.memory();
        let mut machine = CloudHypervisorMachine::start(self, start, memory).await?;
        machine.boot(shape, Some(place), self.landlock).await?;
        Ok(Box::new(machine))
    }

    async fn restore(
        &self,
        shape: &GuestShape,
        place: &Place,
        restore: Restore<'_>,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let contents = unpacked(&place.name, &restore.state)?;
        let start = Start {
            name: &place.name,
            paths: &Paths::new(&place.run_dir),
            place: Some(place.into()),
            boot: None,
        };
        let memory = shape.memory();
        let mut machine = CloudHypervisorMachine::start(self, start, memory).await?;
        machine.restore(self, &contents, restore).await?;
        Ok(Box::new(machine))
    }

    async fn adopt(
        &self,
        shape: &GuestShape,
        place: &Place,
        survivor: Survivor,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let mut machine = CloudHypervisorMachine::adopt(self, shape.memory(), place, survivor)?;
        machine.go_on().await?;
        Ok(Box::new(machine))
    }

    fn prepares(&self) -> Option<&dyn Prepares> {
        Some(self)
    }
}

#[async_trait]
impl Prepares for CloudHypervisor {
    async fn prepare(&self, berth: &Berth) -> Result<Box<dyn Prepared>, VmmError> {
        let prepared = PreparedCloudHypervisor::start(self, berth).await?;
        Ok(Box::new(prepared))
    }
}
