//! QEMU: on KVM where that runs guests, else by emulation; unmodified, with its RAM in a
//! memfd and the preload library for restores.

pub mod command;
pub mod machine;
pub mod probe;
pub mod qmp;

use std::fs;
use std::io;
use std::path::PathBuf;

use async_trait::async_trait;
use http_api::wire::VmmInfo;
use uffd_engine::Tracking;

use super::own_user::Users;
use super::process::Survivor;
use super::{Driver, GuestShape, Machine, Place, Restore, VmmError};
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
    /// Of which QEMUs it reads device states.
    pub state_format: String,
    /// Who its VMMs are, if not the daemon's user.
    pub users: Option<Users>,
}

/// The directory that host and VMM share, which the VMM finds at [`DIR_PATH`](super::launch::DIR_PATH).
fn dir(place: &Place) -> PathBuf {
    place.run_dir.join("vmm")
}

/// The socket of whoever serves memory, there.
const HANDOFF: &str = "uffd.sock";

#[async_trait]
impl Driver for Qemu {
    fn info(&self) -> &VmmInfo {
        &self.info
    }

    fn state_format(&self) -> &str {
        &self.state_format
    }

    /// Its devices' buffers; and what it has translated, of which it keeps a GiB.
    fn overhead_mb(&self) -> u64 {
        match self.accelerator {
            Accelerator::Kvm => 512,
            Accelerator::Tcg => 2048,
        }
    }

    /// The preload library asks for it when it opens the userfaultfd.
    fn tracking(&self) -> Tracking {
        Tracking::Kernel
    }

    fn handoff(&self, place: &Place) -> io::Result<PathBuf> {
        let dir = dir(place);
        fs::create_dir_all(&dir)?;
        Ok(dir.join(HANDOFF))
    }

    async fn boot(&self, shape: &GuestShape, place: &Place) -> Result<Box<dyn Machine>, VmmError> {
        let machine = QemuMachine::start(self, shape, place, false).await?;
        Ok(Box::new(machine))
    }

    async fn restore(
        &self,
        shape: &GuestShape,
        place: &Place,
        restore: Restore<'_>,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let mut machine = QemuMachine::start(self, shape, place, true).await?;
        machine.load(restore.state).await?;
        if restore.run {
            machine.go_on().await?;
        }
        Ok(Box::new(machine))
    }

    async fn adopt(
        &self,
        _shape: &GuestShape,
        place: &Place,
        survivor: Survivor,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let mut machine = QemuMachine::adopt(place, survivor).await?;
        machine.ensure_running().await?;
        Ok(Box::new(machine))
    }
}

/// What its guests have that those of older builds don't: a state with it is read by no machine
/// without it, nor the other way round.
const DEVICES: &str = "balloon";

/// QEMU's machine types change with its minor versions: a state is read by no other.
fn state_format(version: &str) -> String {
    let mut parts = version.split('.');
    let mut part = || parts.next().unwrap_or("0");
    format!("{}.{}+{DEVICES}", part(), part())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::compatibility::{Fit, MadeBy, fit};

    #[test]
    fn a_state_of_a_machine_without_a_balloon_is_not_read() {
        let here = VmmInfo {
            name: "qemu".into(),
            version: "7.2.22".into(),
            accelerator: "tcg".into(),
            reason: String::new(),
        };
        let made = |version: &str, format: &str| {
            MadeBy::from([
                ("name".to_owned(), "qemu".to_owned()),
                ("version".to_owned(), version.to_owned()),
                ("state_format".to_owned(), format.to_owned()),
            ])
        };
        let format = state_format(&here.version);
        assert_eq!(format, "7.2+balloon");
        assert_eq!(fit(&made("7.2.22", "7.2"), &here, &format), Fit::None);
        assert_eq!(fit(&made("7.2.22", &format), &here, &format), Fit::Same);
        assert_eq!(fit(&made("7.2.9", &format), &here, &format), Fit::Readable);
        let newer = state_format("8.0.2");
        assert_eq!(fit(&made("8.0.2", &newer), &here, &format), Fit::None);
    }
}
