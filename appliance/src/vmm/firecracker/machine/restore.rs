//! A guest from what a build keeps.

use std::fs;
use std::io;

use super::{FirecrackerMachine, LINK};
use crate::network::address::TAP;
use crate::vmm::firecracker::bodies::{MemoryBackend, NetworkOverride, SnapshotLoad};
use crate::vmm::firecracker::command::{HANDOFF, Layout, STATE};
use crate::vmm::{DiskLimits, Place, Restore, VmmError};

/// Where the pages of a loaded guest come from.
#[derive(Clone, Copy, Debug)]
pub(in crate::vmm::firecracker) enum MemorySource {
    /// Whoever listens in its directory.
    Served,
    /// A file there.
    File(&'static str),
}

impl FirecrackerMachine {
    /// A guest from the device state that lies in its directory.
    pub(in crate::vmm::firecracker) async fn load(
        &mut self,
        memory: MemorySource,
        place: Option<&Place>,
        run: bool,
    ) -> Result<(), VmmError> {
        if let Some(place) = place {
            self.introduce(place).await?;
        }
        let (backend_type, file) = match memory {
            MemorySource::Served => ("Uffd", HANDOFF),
            MemorySource::File(name) => ("File", name),
        };
        let network = place.map(|_| NetworkOverride {
            iface_id: LINK,
            host_dev_name: TAP,
        });
        let load = SnapshotLoad {
            snapshot_path: self.layout.inside(STATE),
            mem_backend: MemoryBackend {
                backend_type,
                backend_path: self.layout.inside(file),
            },
            resume_vm: run,
            network_overrides: network.into_iter().collect(),
        };
        self.put("/snapshot/load", &load).await
    }

    /// A sandbox's guest from the device state that lies in its directory, which goes then.
    pub(in crate::vmm::firecracker) async fn restore(
        &mut self,
        place: &Place,
        restore: &Restore<'_>,
    ) -> Result<(), VmmError> {
        self.load(MemorySource::Served, Some(place), restore.run)
            .await?;
        self.limit_restored_disk(place, restore.had_disk_limits)
            .await?;
        let _ = fs::remove_file(self.layout.state());
        Ok(())
    }

    /// Gives the disk of a guest that was loaded today's limits; its state has those that it ran with.
    async fn limit_restored_disk(&mut self, place: &Place, had_some: bool) -> Result<(), VmmError> {
        if !had_some && place.disk_limits == DiskLimits::default() {
            return Ok(());
        }
        self.set_disk_limits(place.disk_limits).await
    }
}

/// Puts the device state to load where the VMM looks for it.
pub(in crate::vmm::firecracker) fn write_state(layout: &Layout, state: &[u8]) -> io::Result<()> {
    fs::write(layout.state(), state)
}
