//! A guest whose memory is a shared file, as QEMU's: served, written to, given back and captured.

use std::fs::File;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use snapshot_format::{Build, BuildId, MemoryWriter, PageCount, PageIndex, PageSize, PublishInfo};
use uffd_engine::control::Report;
use uffd_engine::dirty::{Capture, CaptureError, Captured};
use uffd_engine::dirty_set::UnwrittenPages;
use uffd_engine::memory_image::MemoryImage;
use uffd_engine::region::RegionTable;
use uffd_engine::sys::uffd::{
    FEATURE_EVENT_REMOVE, FEATURE_MISSING_SHMEM, FEATURE_WP_ASYNC, FEATURE_WP_SHARED, Uffd,
};
use uffd_engine::vmm_side::GuestMemory;
use uffd_engine::{PageStates, Tracking};

use super::{Guest, Host, PAGE, has_uffd, skip};

pub const PAGES: u64 = 512;

pub struct Shared {
    pub host: Host,
    pub guest: Guest,
    pub ram: File,
    pub states: PageStates,
}

/// An empty memory file.
pub fn ram() -> File {
    let ram = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
    ram.set_len(PAGES * PAGE).unwrap();
    ram
}

/// A guest on a shared file whose writes the kernel remembers; `None` where it can't.
pub fn start(test: &str) -> Option<Shared> {
    if !has_uffd(test) {
        return None;
    }
    let features =
        FEATURE_EVENT_REMOVE | FEATURE_MISSING_SHMEM | FEATURE_WP_ASYNC | FEATURE_WP_SHARED;
    let uffd = match Uffd::create(features) {
        Ok(uffd) => uffd,
        Err(error) => {
            skip(test, &format!("no asynchronous write-protection: {error}"));
            return None;
        }
    };
    let mut host = Host::start(PAGES);
    let (ram, states) = (ram(), table());
    let memory = GuestMemory::shared(&ram, PAGES * PAGE).unwrap();
    let guest = host.attach_uffd("s1", &states, memory, &uffd);
    let report = host.track("s1", Tracking::Kernel);
    assert!(matches!(report, Report::Stats { .. }), "{report:?}");
    Some(Shared {
        host,
        guest,
        ram,
        states,
    })
}

/// A table of missing pages.
pub fn table() -> PageStates {
    PageStates::create(PageCount::new(PAGES)).unwrap()
}

impl Shared {
    pub fn unwritten(&self) -> UnwrittenPages {
        let region = self.guest.memory.as_region();
        let regions = RegionTable::new(&[region], PAGE, PageCount::new(PAGES)).unwrap();
        let pid = std::process::id() as i32;
        UnwrittenPages::of_pagemap(pid, &regions, PageCount::new(PAGES)).unwrap()
    }

    /// Captures into a build of its own.
    pub fn capture(
        &self,
        unwritten: Option<&UnwrittenPages>,
        check: bool,
    ) -> Result<(Captured, Build), CaptureError> {
        let parent = self.host.store.open(&self.host.build).unwrap();
        let memory = MemoryImage::File(self.ram.try_clone().unwrap());
        let capture = Capture {
            memory: &memory,
            pages: PageCount::new(PAGES),
            page_bytes: PAGE,
            states: Some(&self.states),
            unwritten,
            check: check.then_some(&parent),
        };
        write_build(&self.host, |writer| capture.write(writer))
    }

    /// A hole in the file, which no event tells of.
    pub fn punch(&self, page: u64, pages: u64) {
        punch(&self.ram, page, pages);
    }

    /// As QEMU gives memory back: a hole in the file, and an event for the engine.
    pub fn give_back(&self, page: u64, pages: u64) {
        give_back(&self.guest, &self.ram, page, pages);
    }

    /// How many pages the file has.
    pub fn present(&self) -> u64 {
        let memory = MemoryImage::File(self.ram.try_clone().unwrap());
        memory.present(PageCount::new(PAGES), PAGE).unwrap().get()
    }

    /// That a build is what the guest sees: all of it is read through the guest's mapping.
    pub fn assert_is_the_memory(&self, build: &Build) {
        let mut bytes = vec![0; PAGE as usize];
        for page in 0..PAGES {
            build.read_page(PageIndex::new(page), &mut bytes).unwrap();
            for (index, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
                let ours = self.guest.memory.read(page * PAGE + index as u64 * 8);
                assert_eq!(u64::from_le_bytes(*word), ours, "page {page}, word {index}");
            }
        }
    }
}

/// A hole in a file behind somebody's memory.
pub fn punch(ram: &File, page: u64, pages: u64) {
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (at, len) = (page * PAGE, pages * PAGE);
    fallocate(ram, punch, at as i64, len as i64).unwrap();
}

/// As [`Shared::give_back`].
pub fn give_back(guest: &Guest, ram: &File, page: u64, pages: u64) {
    punch(ram, page, pages);
    guest.memory.give_back(page * PAGE, pages * PAGE).unwrap();
}

/// Writes a build whose parent is the one that is served.
pub fn write_build<T, E>(
    host: &Host,
    write: impl FnOnce(&mut MemoryWriter) -> Result<T, E>,
) -> Result<(T, Build), E> {
    let parent = host.store.open(&host.build).unwrap();
    let number = host.store.list().unwrap().len() as u128;
    let id = BuildId::from_bytes((number << 64).to_le_bytes());
    let mut staging = host.store.stage(id).unwrap();
    let pages = PageCount::new(PAGES);
    let mut writer = staging
        .memory_writer(Some(&parent), PageSize::Size4K, pages)
        .unwrap();
    let value = write(&mut writer)?;
    writer.finish().unwrap();
    std::fs::write(staging.file_path("vmstate"), b"state").unwrap();
    staging.add_file("vmstate").unwrap();
    staging.publish(PublishInfo::default()).unwrap();
    Ok((value, host.store.open(&id).unwrap()))
}
