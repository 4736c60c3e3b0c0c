//! What is kept of a stopped guest: its device state alone, or with the pages that are in memory.

use std::fs::{self, File};
use std::io;

use snapshot_format::PageCount;
use uffd_engine::memory_image::{MemoryImage, ProcessMemory};
use uffd_engine::region::{ClaimedRegion, RegionTable};

use super::FirecrackerMachine;
use crate::vmm::firecracker::bodies::SnapshotCreate;
use crate::vmm::{Saved, VmmError};

/// Nothing can be written here: the directory isn't there.
const NOWHERE: &str = "nowhere/memory";
/// What Firecracker says of a memory file that it can't open.
const OF_THE_MEMORY_FILE: &str = "memory";

impl FirecrackerMachine {
    /// The device state alone: it is written before the memory's file is opened, so a memory
    /// file that can't be is an error that comes after all that is wanted. No documentation says
    /// so, which is why it is tried out at start.
    pub(in crate::vmm::firecracker) async fn save_state_only(
        &mut self,
    ) -> Result<Vec<u8>, VmmError> {
        let file = "state";
        let create = SnapshotCreate {
            // Should a file be opened after all, this one reads no page that isn't there.
            snapshot_type: "Diff",
            snapshot_path: self.layout.saved(file),
            mem_file_path: self.layout.saved(NOWHERE),
        };
        match self.put("/snapshot/create", &create).await {
            Err(VmmError::Refused { answer, .. }) if answer.contains(OF_THE_MEMORY_FILE) => {}
            Err(error) => return Err(error),
            Ok(()) => {
                return Err(VmmError::Refused {
                    name: self.name.clone(),
                    command: "saving its state".into(),
                    answer: "it wrote memory to where nothing can be".into(),
                });
            }
        }
        self.take_saved(file)
    }

    /// The device state, and the pages that are in memory. Bringing in others, as a full
    /// snapshot would, is what a lazily restored guest is to be spared.
    pub(super) async fn save_with_memory(&mut self, kind: &'static str) -> Result<Saved, VmmError> {
        let lent = i64::try_from(self.memory_bytes).unwrap_or(i64::MAX);
        self.lend_memory(lent)
            .map_err(|source| self.io("making room for its memory", source))?;
        let create = SnapshotCreate {
            snapshot_type: kind,
            snapshot_path: self.layout.saved("state"),
            mem_file_path: self.layout.saved("memory"),
        };
        self.put("/snapshot/create", &create).await?;
        let state = self.take_saved("state")?;
        let path = self.layout.saved_by(self.process.pid(), "memory");
        // Held open and without a name: it goes with its reader.
        let memory = File::open(&path)
            .and_then(|file| fs::remove_file(&path).map(|()| file))
            .map_err(|source| self.io("reading the memory it saved", source))?;
        Ok(Saved {
            state,
            memory: MemoryImage::File(memory),
        })
    }

    /// Changes what its control group may have to so much more than it needs when it runs. What is
    /// saved counts until its reader lets go of it.
    pub(super) fn lend_memory(&mut self, bytes: i64) -> io::Result<()> {
        let (Some(cgroup), more) = (self.process.cgroup(), bytes - self.lent_bytes) else {
            return Ok(());
        };
        if more != 0 {
            cgroup.change_memory(more)?;
            self.lent_bytes = bytes;
        }
        Ok(())
    }

    fn take_saved(&self, name: &str) -> Result<Vec<u8>, VmmError> {
        let path = self.layout.saved_by(self.process.pid(), name);
        let bytes = fs::read(&path).and_then(|bytes| fs::remove_file(&path).map(|()| bytes));
        let bytes = bytes.map_err(|source| self.io("reading the state it saved", source))?;
        if bytes.is_empty() {
            let source = io::Error::other("the file is empty");
            return Err(self.io("reading the state it saved", source));
        }
        Ok(bytes)
    }

    pub(super) fn process_memory(&self, served: &[ClaimedRegion]) -> Result<MemoryImage, VmmError> {
        // It was checked when it was handed over.
        let page = served.first().map_or(1, |region| region.page_size);
        let pages = PageCount::new(self.memory_bytes / page);
        let regions = RegionTable::new(served, page, pages).map_err(io::Error::other);
        regions
            .and_then(|regions| ProcessMemory::open(self.process.pid(), regions))
            .map(MemoryImage::Process)
            .map_err(|source| self.io("looking into its memory", source))
    }
}
