//! What a merge writes, known before it begins.
//!
//! The pages with content are packed in the order of the memory, so where each of them goes
//! follows from the source's map alone. That makes a merge resumable: how many pages are
//! written already says which one comes next.

use std::iter::Peekable;

use crate::chunk_source::Placed;
use crate::extent::{Extent, Origin};
use crate::memory_map::MemoryMap;
use crate::units::{PageCount, PageIndex, PageSize};

/// The stored pages of a memory in ascending order, in windows of equal size.
#[derive(Debug)]
pub(crate) struct Windows<I: Iterator<Item = Extent>> {
    extents: I,
    /// What is left of an extent that a window ended in.
    rest: Option<Extent>,
    page_size: PageSize,
    window: PageCount,
}

impl<I: Iterator<Item = Extent>> Windows<I> {
    /// Windows of `window` pages, after the first `skip` stored pages.
    pub(crate) fn new(extents: I, page_size: PageSize, window: PageCount, skip: PageCount) -> Self {
        let mut windows = Self {
            extents,
            rest: None,
            page_size,
            window,
        };
        let mut left = skip;
        while let Some(taken) = windows.take(left) {
            left = PageCount::new(left.get() - taken.pages.get());
        }
        windows
    }

    /// The next stored pages, at most `most` and of one extent; `None` if `most` is 0.
    fn take(&mut self, most: PageCount) -> Option<Extent> {
        if most.is_zero() {
            return None;
        }
        let next = match self.rest.take() {
            Some(rest) => rest,
            None => self.extents.find(|extent| extent.origin != Origin::Zero)?,
        };
        let cut = next.start + most.min(next.pages);
        self.rest = next.clip(&(cut..next.end()));
        next.clip(&(next.start..cut))
    }

    /// Replaces `placed` by the extents of the next window; 0 pages at the end.
    pub(crate) fn next_into(&mut self, placed: &mut Vec<Placed>) -> PageCount {
        placed.clear();
        let mut filled = PageCount::default();
        while let Some(extent) = self.take(PageCount::new(self.window.get() - filled.get())) {
            let at = filled.bytes(self.page_size);
            let at = at.and_then(|bytes| usize::try_from(bytes).ok());
            let at = at.expect("a window fits memory");
            placed.push(Placed { extent, at });
            filled = filled + extent.pages;
        }
        filled
    }
}

/// The extents of the merged map: zero memory where the source has it, and everything else in
/// the only build there is, back to back.
pub(crate) struct MergedExtents<I: Iterator<Item = Extent>> {
    source: Peekable<I>,
    storage: PageIndex,
}

pub(crate) fn merged_extents(map: &MemoryMap) -> MergedExtents<impl Iterator<Item = Extent> + '_> {
    MergedExtents {
        source: map.all_extents().peekable(),
        storage: PageIndex::new(0),
    }
}

/// How many pages of a memory have content.
pub(crate) fn stored_pages(map: &MemoryMap) -> PageCount {
    let stored = map.all_extents().filter(|e| e.origin != Origin::Zero);
    stored.map(|extent| extent.pages).sum()
}

impl<I: Iterator<Item = Extent>> Iterator for MergedExtents<I> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        let first = self.source.next()?;
        let zero = first.origin == Origin::Zero;
        let mut pages = first.pages;
        let alike = |next: &Extent| (next.origin == Origin::Zero) == zero;
        while let Some(more) = self.source.next_if(alike) {
            pages = pages + more.pages;
        }
        if zero {
            return Some(Extent::zero(first.start..first.start + pages));
        }
        let storage = self.storage;
        self.storage = storage + pages;
        Some(Extent {
            start: first.start,
            pages,
            origin: Origin::Build(0),
            storage,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, pages: u64, origin: Origin, storage: u64) -> Extent {
        Extent {
            start: PageIndex::new(start),
            pages: PageCount::new(pages),
            origin,
            storage: PageIndex::new(storage),
        }
    }

    const A: Origin = Origin::Build(0);
    const B: Origin = Origin::Build(1);

    fn source() -> Vec<Extent> {
        vec![
            extent(0, 2, Origin::Zero, 0),
            extent(2, 5, A, 10),
            extent(7, 1, B, 3),
            extent(8, 3, Origin::Zero, 0),
            extent(11, 4, B, 0),
        ]
    }

    fn pages(skip: u64, window: u64) -> Vec<(Origin, u64)> {
        let (window, skip) = (PageCount::new(window), PageCount::new(skip));
        let mut windows = Windows::new(source().into_iter(), PageSize::Size4K, window, skip);
        let (mut all, mut placed) = (Vec::new(), Vec::new());
        loop {
            let filled = windows.next_into(&mut placed);
            assert!(filled <= window);
            if filled.is_zero() {
                return all;
            }
            let base = all.len();
            for Placed { extent, at } in &placed {
                assert_eq!(at / 4096 + base, all.len());
                let storage = extent.storage.get();
                all.extend((0..extent.pages.get()).map(|page| (extent.origin, storage + page)));
            }
        }
    }

    #[test]
    fn windows_of_any_size_from_any_page_on_are_the_stored_pages_in_order() {
        let a = (10..15).map(|storage| (A, storage));
        let all: Vec<_> = a.chain([(B, 3)]).chain((0..4).map(|s| (B, s))).collect();
        for window in 1..12 {
            for skip in 0..=10 {
                let expected = &all[usize::try_from(skip).unwrap()..];
                assert_eq!(pages(skip, window), expected, "{window} {skip}");
            }
        }
    }

    #[test]
    fn merged_extents_alternate_and_are_stored_back_to_back() {
        let merged = MergedExtents {
            source: source().into_iter().peekable(),
            storage: PageIndex::new(0),
        };
        let expected = [
            extent(0, 2, Origin::Zero, 0),
            extent(2, 6, A, 0),
            extent(8, 3, Origin::Zero, 0),
            extent(11, 4, A, 6),
        ];
        assert_eq!(merged.collect::<Vec<_>>(), expected);
    }
}
