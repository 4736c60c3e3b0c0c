//! How a guest's memory that is a shared file (QEMU's) is filled: `UFFDIO_COPY` from the page
//! cache, or a read straight into the file's pages, which are then mapped by `UFFDIO_CONTINUE`.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, FEATURE_MISSING_SHMEM, Uffd};
use uffd_engine::vmm_side::GuestMemory;

use super::populate::gb_per_second;
use crate::config::{Ahead, PAGE_BYTES};
use crate::faulter::recycle;
use crate::report::parts::Part;
use crate::source::{Source, Words};
use crate::sys::copy_page::{continue_pages, copy_pages};
use crate::sys::page_source::PageSource;
use crate::sys::shared;
use crate::workload::rounds::{Way, interleaved};

/// Pages of one installation: those of a replay's longest run, and of a default window.
const BATCHES: [u64; 2] = [64, 16];

/// Copies beside continuations, from the page cache.
pub(super) fn measure(config: &Ahead, source: &Source) -> Result<Part> {
    let file = File::open(source.data()).context("Opening the build's data")?;
    let mut ways: Vec<Way<'_>> = Vec::new();
    for batch in BATCHES {
        let file = &file;
        let copy = move || {
            source.keep_in_page_cache()?;
            let mut mapped = PageSource::mapped(file)?;
            let guest = Guest::new(config.pages)?;
            guest.fill(batch, |address, page, bytes| {
                let from = mapped.page(page)?;
                Ok(copy_pages(guest.uffd.as_fd(), address, from, bytes)?)
            })
        };
        ways.push((copy_name(batch), Box::new(copy)));
        let read = move || {
            source.keep_in_page_cache()?;
            let guest = Guest::new(config.pages)?;
            let mut alias = shared::map(&guest.ram)?;
            guest.fill(batch, |address, page, bytes| {
                let at = (page * PAGE_BYTES) as usize;
                let into = &mut alias[at..at + bytes as usize];
                file.read_exact_at(into, page * PAGE_BYTES)?;
                Ok(continue_pages(guest.uffd.as_fd(), address, bytes)?)
            })
        };
        ways.push((continue_name(batch), Box::new(read)));
    }
    let samples = interleaved(config.rounds, ways)?;
    let about = "memory that is a shared file, bare loops, mappings as new as an engine's";
    let part = Part::new("populate shared", about, "GB/s", samples);
    Ok(BATCHES.into_iter().fold(part, |part, batch| {
        part.ratio(&continue_name(batch), &copy_name(batch))
    }))
}

fn copy_name(batch: u64) -> String {
    format!("COPY, {} KiB", batch * 4)
}

fn continue_name(batch: u64) -> String {
    format!("read + CONTINUE, {} KiB", batch * 4)
}

/// Memory of this process, in a memfd.
struct Guest {
    ram: File,
    memory: GuestMemory,
    uffd: Uffd,
    pages: u64,
}

impl Guest {
    fn new(pages: u64) -> Result<Self> {
        recycle(pages)?;
        let ram = File::from(memfd_create(c"bench-ram", MFdFlags::MFD_CLOEXEC)?);
        ram.set_len(pages * PAGE_BYTES)?;
        let memory = GuestMemory::shared(&ram, pages * PAGE_BYTES)?;
        let uffd = Uffd::create(FEATURE_EVENT_REMOVE | FEATURE_MISSING_SHMEM)?;
        memory.register(&uffd)?;
        Ok(Self {
            ram,
            memory,
            uffd,
            pages,
        })
    }

    /// Has everything installed, in order, and looks at what came of it.
    fn fill(
        &self,
        batch: u64,
        mut install: impl FnMut(u64, u64, u64) -> Result<()>,
    ) -> Result<f64> {
        let begun = Instant::now();
        for page in (0..self.pages).step_by(batch as usize) {
            let bytes = batch.min(self.pages - page) * PAGE_BYTES;
            let address = self.memory.base().get() + page * PAGE_BYTES;
            install(address, page, bytes)?;
        }
        let took = begun.elapsed();
        for page in 0..self.pages {
            let found = self.memory.read(page * PAGE_BYTES);
            ensure!(
                found == Words::OfBuild.of(page),
                "page {page} begins with {found:#x}"
            );
        }
        Ok(gb_per_second(self.pages, took))
    }
}
