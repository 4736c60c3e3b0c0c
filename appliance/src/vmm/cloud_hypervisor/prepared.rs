//! A Cloud Hypervisor that waits for a guest: started, its filters on, its API open.
//!
//! Its disk comes when it is claimed, into the mount namespace that it has by then. Landlock comes
//! with the guest's configuration, after that: its rule for the disk is about the one that was
//! brought, and nothing can be mounted over it from inside.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use async_trait::async_trait;

use super::CloudHypervisor;
use super::command::Layout as Paths;
use super::machine::CloudHypervisorMachine;
use super::unpacked;
use super::waiting::{Start, Waiting};
use crate::sys::mount_namespace;
use crate::vmm::launch::DISK_PATH;
use crate::vmm::own_user::give;
use crate::vmm::prepared::{Berth, Prepared};
use crate::vmm::{GuestShape, Machine, Place, Restore, VmmError};

/// One of them.
pub(super) struct PreparedCloudHypervisor {
    driver: CloudHypervisor,
    waiting: Waiting,
}

impl PreparedCloudHypervisor {
    pub(super) async fn start(driver: &CloudHypervisor, berth: &Berth) -> Result<Self, VmmError> {
        let start = Start {
            name: &berth.name(),
            paths: &Paths::new(&berth.run_dir),
            place: Some(berth.into()),
            boot: None,
        };
        Ok(Self {
            waiting: Waiting::start(driver, start).await?,
            driver: driver.clone(),
        })
    }

    /// Shows it its disk.
    fn bring(&self, disk: &Path) -> io::Result<()> {
        if let Some(user) = self.waiting.user {
            give(disk, user)?;
        }
        let disk = mount_namespace::detached(disk)?;
        mount_namespace::within(self.waiting.process(), || {
            mount_namespace::attach(disk.as_fd(), Path::new(DISK_PATH))
        })
    }
}

#[async_trait]
impl Prepared for PreparedCloudHypervisor {
    fn pidfd(&self) -> BorrowedFd<'_> {
        self.waiting.process()
    }

    async fn restore(
        self: Box<Self>,
        shape: &GuestShape,
        place: &Place,
        restore: Restore<'_>,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let name = &place.name;
        let contents = unpacked(name, &restore.state)?;
        self.bring(&place.disk).map_err(|source| VmmError::Start {
            name: name.clone(),
            source,
        })?;
        let Self { driver, waiting } = *self;
        let paths = Paths::new(&place.run_dir);
        let sizes = (shape.memory(), place.disk_limits);
        let mut machine =
            CloudHypervisorMachine::over(&driver, name, &paths, sizes, waiting).await?;
        machine.restore(&driver, &contents, restore).await?;
        Ok(Box::new(machine))
    }
}
