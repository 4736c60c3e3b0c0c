//! QEMU: on KVM where that runs guests, else by emulation; unmodified, with its RAM in a
//! memfd and the preload library for restores.

pub mod command;
pub mod machine;
pub mod probe;
pub mod qmp;

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use http_api::wire::VmmInfo;

use super::{Driver, GuestShape, Machine, Place, VmmError};
use command::Accelerator;
use machine::QemuMachine;

/// The driver.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// The preload library.
    pub preload: PathBuf,
    /// What executes the guest's instructions.
    pub accelerator: Accelerator,
    /// What to tell people.
    pub info: VmmInfo,
}

#[async_trait]
impl Driver for Qemu {
    fn info(&self) -> &VmmInfo {
        &self.info
    }

    async fn boot(&self, shape: &GuestShape, place: &Place) -> Result<Box<dyn Machine>, VmmError> {
        let machine = QemuMachine::start(self, shape, place, None).await?;
        Ok(Box::new(machine))
    }

    async fn restore(
        &self,
        shape: &GuestShape,
        place: &Place,
        state: Vec<u8>,
        handoff: &Path,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let mut machine = QemuMachine::start(self, shape, place, Some(handoff)).await?;
        machine.load(state).await?;
        Ok(Box::new(machine))
    }
}
