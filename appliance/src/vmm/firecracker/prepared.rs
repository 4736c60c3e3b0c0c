//! A Firecracker that waits for a guest: started, jailed or not, its API open.
//!
//! Its disk and the room for what it saves come when it is claimed, into the mount namespace that
//! it has by then; nothing of that is seen on the host, and all of it goes with the process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::chown;
use std::path::Path;

use async_trait::async_trait;
use nix::mount::{MsFlags, mount};

use super::command::{Layout, Parts};
use super::machine::{FirecrackerMachine, make_dir, open, write_state};
use super::{Firecracker, VmmError};
use crate::sys::mount_namespace;
use crate::vmm::launch::DISK_PATH;
use crate::vmm::opening::Open;
use crate::vmm::prepared::{Berth, Prepared};
use crate::vmm::{GuestShape, Machine, Place, Restore};

/// One of them.
pub(super) struct PreparedFirecracker {
    driver: Firecracker,
    open: Open,
}

impl PreparedFirecracker {
    pub(super) async fn start(driver: &Firecracker, berth: &Berth) -> Result<Self, VmmError> {
        let name = berth.name();
        let jailer = driver.jailer.as_ref();
        let layout = Layout::new(&berth.run_dir, berth.slot, &driver.program, jailer);
        let mount_point = || {
            make_dir(&layout)?;
            // A jail's /run is this directory; elsewhere it is the host's, which has one.
            File::create(
                layout
                    .dir
                    .join(Path::new(DISK_PATH).file_name().unwrap_or_default()),
            )
        };
        mount_point().map_err(|source| VmmError::Start {
            name: name.clone(),
            source,
        })?;
        let parts = Parts {
            kernel: None,
            initrd: None,
            disk: None,
            namespace: Some(&berth.namespace),
            memory_bytes: 0,
            cgroup: berth.cgroup.as_ref(),
        };
        Ok(Self {
            driver: driver.clone(),
            open: open(driver, &name, &layout, &parts).await?,
        })
    }

    /// Shows it its disk, and lets it save as much as a guest of this size needs.
    fn bring(&self, layout: &Layout, disk: &Path, memory_bytes: u64) -> io::Result<()> {
        let disk = mount_namespace::detached(disk)?;
        let size = format!("size={}", Layout::save_bytes(memory_bytes));
        mount_namespace::within(self.open.process.as_fd(), || {
            mount_namespace::attach(disk.as_fd(), Path::new(DISK_PATH))?;
            let (none, flags) = (None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID);
            mount(none, layout.save_dir(), none, flags, Some(size.as_str()))?;
            Ok(())
        })
    }
}

#[async_trait]
impl Prepared for PreparedFirecracker {
    fn pidfd(&self) -> BorrowedFd<'_> {
        self.open.process.as_fd()
    }

    async fn restore(
        self: Box<Self>,
        shape: &GuestShape,
        place: &Place,
        restore: Restore<'_>,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let layout = self.driver.layout(place);
        let memory_bytes = shape.memory_bytes();
        let readied = || {
            write_state(&layout, &restore.state)?;
            make_dir(&layout)?;
            if layout.user != 0 {
                chown(&place.disk, Some(layout.user), Some(layout.user))?;
            }
            self.bring(&layout, &place.disk, memory_bytes)
        };
        readied().map_err(|source| VmmError::Start {
            name: place.name.clone(),
            source,
        })?;
        let Self { driver, open } = *self;
        let mut machine =
            FirecrackerMachine::over(&driver, &place.name, layout, memory_bytes, open).await?;
        machine.restore(place, &restore).await?;
        Ok(Box::new(machine))
    }
}
