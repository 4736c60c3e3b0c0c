//! What a diff's parent has in a window of pages, read with few system calls.
//!
//! A window's extents are sorted by where they are stored and neighbouring ones are read at
//! once, small gaps included, so that a parent whose pages alternate between two builds costs
//! two reads and not one per page.

use std::ops::Range;

use crate::build::Build;
use crate::data_file::DataFile;
use crate::error::FormatError;
use crate::extent::{Extent, Origin};
use crate::sparse::READ_BYTES;
use crate::units::{PageCount, PageIndex, PageSize};

/// Reading through a gap of this size is cheaper than another system call.
const GAP_BYTES: u64 = 32 << 10;

/// How many pages one window has at most.
pub(crate) fn window_pages(page_size: PageSize) -> u64 {
    (READ_BYTES as u64 / page_size.bytes()).max(1)
}

/// The parent's pages in one window at a time; zero memory if there is no parent.
#[derive(Debug)]
pub(crate) struct ParentPages {
    parent: Option<Build>,
    page_size: PageSize,
    /// The content of the window; garbage where `zero` says so.
    window: Vec<u8>,
    zero: Vec<bool>,
    bounce: Vec<u8>,
}

/// Extents of one origin that are read at once.
struct Run<'a> {
    origin: u16,
    storage: Range<PageIndex>,
    extents: &'a [Extent],
}

impl ParentPages {
    pub(crate) fn new(parent: Option<Build>, page_size: PageSize) -> Self {
        Self {
            parent,
            page_size,
            window: Vec::new(),
            zero: Vec::new(),
            bounce: Vec::new(),
        }
    }

    pub(crate) fn parent(&self) -> Option<&Build> {
        self.parent.as_ref()
    }

    /// Loads a window of at most [`window_pages`] pages of the memory.
    pub(crate) fn load(&mut self, start: PageIndex, pages: usize) -> Result<(), FormatError> {
        self.zero.clear();
        self.zero.resize(pages, true);
        // Cloned handle: the fields below are borrowed for writing.
        let Some(parent) = self.parent.clone() else {
            return Ok(());
        };
        self.window.resize(pages * self.page_bytes(), 0);
        let end = start + PageCount::new(pages as u64);
        let mut stored: Vec<_> = parent
            .map()
            .extents(start..end)
            .filter(|extent| extent.origin != Origin::Zero)
            .collect();
        stored.sort_unstable_by_key(|extent| (extent.origin, extent.storage));
        let mut rest = stored.as_slice();
        while let Some(run) = next_run(&mut rest, self.page_size) {
            self.read(&parent, &run, start)?;
        }
        Ok(())
    }

    /// The content of a page of the window; `None` if it is zero memory.
    pub(crate) fn page(&self, position: usize) -> Option<&[u8]> {
        let at = position * self.page_bytes();
        (!self.zero[position]).then(|| &self.window[at..at + self.page_bytes()])
    }

    fn read(
        &mut self,
        parent: &Build,
        run: &Run<'_>,
        window_start: PageIndex,
    ) -> Result<(), FormatError> {
        let page_bytes = self.page_bytes();
        let data = &parent.data_files()[usize::from(run.origin)];
        if let [extent] = run.extents {
            let position = in_memory(extent.start - window_start);
            let pages = in_memory(extent.pages);
            self.zero[position..][..pages].fill(false);
            let window = &mut self.window[position * page_bytes..][..pages * page_bytes];
            return data.read_bytes(window, DataFile::offset(extent.storage, self.page_size));
        }
        let pages = in_memory(run.storage.end - run.storage.start);
        self.bounce.resize(pages * page_bytes, 0);
        let at = DataFile::offset(run.storage.start, self.page_size);
        data.read_bytes(&mut self.bounce, at)?;
        for extent in run.extents {
            let from = in_memory(extent.storage - run.storage.start) * page_bytes;
            let position = in_memory(extent.start - window_start);
            let pages = in_memory(extent.pages);
            self.window[position * page_bytes..][..pages * page_bytes]
                .copy_from_slice(&self.bounce[from..][..pages * page_bytes]);
            self.zero[position..][..pages].fill(false);
        }
        Ok(())
    }

    fn page_bytes(&self) -> usize {
        in_memory(PageCount::new(self.page_size.bytes()))
    }
}

/// Takes the extents that are worth one read from the front of a sorted list.
fn next_run<'a>(rest: &mut &'a [Extent], page_size: PageSize) -> Option<Run<'a>> {
    let all = *rest;
    let first = all.first()?;
    let Origin::Build(origin) = first.origin else {
        unreachable!("zero memory was filtered out");
    };
    let gap = PageCount::new(GAP_BYTES / page_size.bytes());
    let longest = PageCount::new(window_pages(page_size));
    let mut end = first.storage + first.pages;
    let mut taken = 1;
    for extent in &all[1..] {
        let extent_end = extent.storage + extent.pages;
        let near = extent.origin == first.origin
            && extent.storage <= end + gap
            && extent_end <= first.storage + longest;
        if !near {
            break;
        }
        end = end.max(extent_end);
        taken += 1;
    }
    let (extents, behind) = all.split_at(taken);
    *rest = behind;
    Some(Run {
        origin,
        storage: first.storage..end,
        extents,
    })
}

fn in_memory(count: PageCount) -> usize {
    usize::try_from(count.get()).expect("a window fits memory")
}
