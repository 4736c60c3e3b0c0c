//! Which pages of a guest differ from its parent, and how that is known.
//!
//! | source | exact on | cost |
//! |---|---|---|
//! | [`DirtySource::WriteProtect`] | anonymous memory, any VMM | one event per page written first |
//! | [`DirtySource::PagemapScan`] | all memory, if its userfaultfd was opened with `WP_ASYNC` | a walk of the page table |
//! | [`DirtySource::Comparison`] | everything | every installed page is read |
//!
//! The comparison is the truth that the others are checked against. A cheap source may name a
//! page too many (a guest wrote what was there), never one too few: then nothing may be
//! published, because the old content would come back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use snapshot_format::{Build, FormatError, PageCount, PageIndex};
use thiserror::Error;

use crate::address::HostAddr;
use crate::page_state::{PageState, PageStates};
use crate::region::RegionTable;
use crate::sys::pagemap::{self, Ranges};

/// How a dirty set came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtySource {
    /// The engine saw the first write to each page.
    WriteProtect,
    /// The kernel remembered written pages.
    PagemapScan,
    /// Content was compared with the parent's.
    Comparison,
}

impl DirtySource {
    /// As it is written into a build's labels.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::WriteProtect => "write_protect",
            Self::PagemapScan => "pagemap_scan",
            Self::Comparison => "comparison",
        }
    }
}

/// Pages that are in memory and that nobody has written since they were installed: the opposite
/// of a set that may be too large, it may be too small.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnwrittenPages {
    source: DirtySource,
    /// One for each page of the memory.
    pages: Vec<bool>,
}

impl UnwrittenPages {
    /// Asks the page table of a stopped VMM, whose session was told
    /// [`Tracking::Kernel`](crate::Tracking::Kernel). Empty where its userfaultfd has no `WP_ASYNC`.
    ///
    /// # Errors
    /// [`DirtyError::Scan`].
    pub fn of_pagemap(
        pid: i32,
        regions: &RegionTable,
        memory_pages: PageCount,
    ) -> Result<Self, DirtyError> {
        let mut unwritten = vec![false; memory_pages.get() as usize];
        mark(&mut unwritten, pid, regions, pagemap::unwritten)?;
        Ok(Self {
            source: DirtySource::PagemapScan,
            pages: unwritten,
        })
    }

    /// What the table of a stopped VMM's session says, which was told
    /// [`Tracking::Events`](crate::Tracking::Events) and did so.
    #[must_use]
    pub fn of_tracked(states: &PageStates) -> Self {
        let unwritten =
            |page: PageIndex| matches!(states.get(page), PageState::Clean | PageState::Zero);
        Self {
            source: DirtySource::WriteProtect,
            pages: all_pages(states).map(unwritten).collect(),
        }
    }

    /// How it is known.
    #[must_use]
    pub const fn source(&self) -> DirtySource {
        self.source
    }

    /// Whether a page is one of them.
    #[must_use]
    pub fn has(&self, page: PageIndex) -> bool {
        self.pages.get(page.get() as usize) == Some(&true)
    }
}

/// Sets the flags of the pages in the ranges that a scan of all regions finds.
fn mark(
    flags: &mut [bool],
    pid: i32,
    regions: &RegionTable,
    scan: impl Fn(&File, HostAddr, u64) -> io::Result<Ranges>,
) -> Result<(), DirtyError> {
    let failed = |source| DirtyError::Scan { pid, source };
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(failed)?;
    for region in regions.regions() {
        let bytes = region.pages.get() * regions.page_bytes();
        for (start, end) in scan(&pagemap, region.base, bytes).map_err(failed)? {
            for (first, pages) in regions.pages_in(start, end) {
                flags[first.get() as usize..][..pages.get() as usize].fill(true);
            }
        }
    }
    Ok(())
}

/// Pages that may differ from the parent, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtySet {
    /// How it came to be.
    pub source: DirtySource,
    pages: Vec<PageIndex>,
}

/// Two sources disagree, so that neither may be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("Page {page:#x} differs from the parent, and {source_used:?} does not say so ({missed} such pages)", page = page.get())]
pub struct Divergence {
    /// Whose set it is.
    pub source_used: DirtySource,
    /// The first page that is missing from it.
    pub page: PageIndex,
    /// How many are.
    pub missed: u64,
}

/// Why a set can't be made.
#[derive(Debug, Error)]
pub enum DirtyError {
    /// The page table of the VMM's process can't be asked.
    #[error("Scanning the page table of process {pid}")]
    Scan {
        /// The VMM.
        pid: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The guest's memory can't be read.
    #[error("Reading guest memory at page {page}")]
    Memory {
        /// Where.
        page: PageIndex,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The parent can't be read.
    #[error("Reading the parent of a guest's memory")]
    Parent(#[from] FormatError),
}

impl DirtySet {
    /// What the table of a session that tracked writes says: see the `Track` request.
    #[must_use]
    pub fn of_tracked(states: &PageStates) -> Self {
        let dirty =
            |page: &PageIndex| matches!(states.get(*page), PageState::Dirty | PageState::Removed);
        Self {
            source: DirtySource::WriteProtect,
            pages: all_pages(states).filter(dirty).collect(),
        }
    }

    /// What the kernel remembers of memory whose userfaultfd was opened with `WP_ASYNC` and
    /// whose pages were installed write-protected; and what was given back.
    ///
    /// # Errors
    /// [`DirtyError::Scan`].
    pub fn of_pagemap(
        pid: i32,
        regions: &RegionTable,
        states: &PageStates,
    ) -> Result<Self, DirtyError> {
        let mut written = vec![false; states.pages().get() as usize];
        mark(&mut written, pid, regions, pagemap::written)?;
        let dirty =
            |page: &PageIndex| written[page.get() as usize] || was_zeroed(states.get(*page));
        Ok(Self {
            source: DirtySource::PagemapScan,
            pages: all_pages(states).filter(dirty).collect(),
        })
    }

    /// What differs, byte for byte. The guest must be stopped. `memory` is the VMM's
    /// `/proc/PID/mem`; only pages that the table calls installed are read, because any other
    /// would be a fault that its reader has to answer itself.
    ///
    /// # Errors
    /// [`DirtyError::Memory`] or [`DirtyError::Parent`].
    pub fn of_comparison(
        memory: &File,
        regions: &RegionTable,
        states: &PageStates,
        parent: &Build,
    ) -> Result<Self, DirtyError> {
        let bytes = regions.page_bytes() as usize;
        let (mut ours, mut theirs) = (vec![0; bytes], vec![0; bytes]);
        let mut pages = Vec::new();
        for page in all_pages(states) {
            let state = states.get(page);
            if matches!(state, PageState::Missing | PageState::Reading) {
                continue;
            }
            parent.read_page(page, &mut theirs)?;
            if state == PageState::Removed {
                ours.fill(0);
            } else {
                let (addr, _) = regions.addr_of(page);
                memory
                    .read_exact_at(&mut ours, addr.get())
                    .map_err(|source| DirtyError::Memory { page, source })?;
            }
            if ours != theirs {
                pages.push(page);
            }
        }
        Ok(Self {
            source: DirtySource::Comparison,
            pages,
        })
    }

    /// The pages, ascending.
    #[must_use]
    pub fn pages(&self) -> &[PageIndex] {
        &self.pages
    }

    /// Checks this set against the truth. Publish nothing after an error.
    ///
    /// # Errors
    /// A page of `truth` is not in this set.
    ///
    /// # Panics
    /// `truth` is no comparison.
    pub fn self_check(&self, truth: &Self) -> Result<(), Divergence> {
        assert_eq!(
            truth.source,
            DirtySource::Comparison,
            "only content is the truth"
        );
        let missing = |page: &&PageIndex| self.pages.binary_search(page).is_err();
        let mut missed = truth.pages.iter().filter(missing);
        match missed.next() {
            None => Ok(()),
            Some(page) => Err(Divergence {
                source_used: self.source,
                page: *page,
                missed: 1 + missed.count() as u64,
            }),
        }
    }
}

fn all_pages(states: &PageStates) -> impl Iterator<Item = PageIndex> {
    (0..states.pages().get()).map(PageIndex::new)
}

/// Zero in place of what the parent may have.
fn was_zeroed(state: PageState) -> bool {
    matches!(state, PageState::Removed | PageState::Dirty)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(source: DirtySource, pages: &[u64]) -> DirtySet {
        DirtySet {
            source,
            pages: pages.iter().copied().map(PageIndex::new).collect(),
        }
    }

    #[test]
    fn a_page_too_many_is_fine_and_one_too_few_is_not() {
        let truth = set(DirtySource::Comparison, &[2, 5, 9]);
        let more = set(DirtySource::WriteProtect, &[1, 2, 5, 9]);
        assert_eq!(more.self_check(&truth), Ok(()));
        let fewer = set(DirtySource::PagemapScan, &[2, 7]);
        let found = fewer.self_check(&truth).unwrap_err();
        assert_eq!((found.page.get(), found.missed), (5, 2));
        assert_eq!(found.source_used, DirtySource::PagemapScan);
    }
}
