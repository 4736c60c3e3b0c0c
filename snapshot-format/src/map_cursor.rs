//! Looking up pages in ascending order, and walking a map by runs.
//!
//! A cursor remembers the extent of its last page. A page in the same extent or a few extents
//! on costs a step or two, so a pass over a memory is linear, whatever the stride; any other page
//! costs one search, as [`MemoryMap::lookup`] does.

use std::iter::Peekable;
use std::ops::Range;

use crate::extent::{Extent, Origin};
use crate::memory_map::MemoryMap;
use crate::units::{PageCount, PageIndex};

/// Extents that are stepped over before a search is cheaper.
const STEPS: usize = 8;

/// A position in a map.
#[derive(Clone, Debug)]
pub struct MapCursor<'a> {
    map: &'a MemoryMap,
    position: usize,
    extent: Extent,
}

/// A run of pages of one origin, wherever in its data they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginRun {
    /// The first page, in guest memory.
    pub start: PageIndex,
    /// How many pages; at least one.
    pub pages: PageCount,
    /// Where all of their content is.
    pub origin: Origin,
}

/// The runs of equal origin in a range; see [`MemoryMap::origin_runs`].
#[derive(Clone, Debug)]
pub struct OriginRuns<I: Iterator<Item = Extent>> {
    extents: Peekable<I>,
}

impl MemoryMap {
    /// A cursor at page 0.
    pub fn cursor(&self) -> MapCursor<'_> {
        MapCursor {
            map: self,
            position: 0,
            extent: self.extent_at(0),
        }
    }

    /// The longest runs of equal origin in a range of pages, clipped to it.
    ///
    /// Neighbours differ in origin; inside a run, storage may jump.
    pub fn origin_runs(
        &self,
        range: Range<PageIndex>,
    ) -> OriginRuns<impl Iterator<Item = Extent> + '_> {
        OriginRuns {
            extents: self.extents(range).peekable(),
        }
    }
}

impl MapCursor<'_> {
    /// The extent that contains a page, as [`MemoryMap::lookup`]; the cursor is there then.
    /// Outside the memory it is `None`, and the cursor stays.
    #[inline]
    pub fn lookup(&mut self, page: PageIndex) -> Option<Extent> {
        if self.extent.start <= page && page < self.extent.end() {
            return Some(self.extent);
        }
        self.seek(page)
    }

    /// Moves to the next extent; `None` behind the last, and the cursor stays.
    pub fn advance(&mut self) -> Option<Extent> {
        self.go(self.position + 1)
    }

    /// The extent the cursor is at.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// The extents of a range, clipped to it, as [`MemoryMap::extents`]; found from the cursor,
    /// which is at the last of them when all were taken.
    pub fn range(&mut self, range: Range<PageIndex>) -> impl Iterator<Item = Extent> + '_ {
        let mut next = range.start;
        std::iter::from_fn(move || {
            if next >= range.end {
                return None;
            }
            let part = self.lookup(next)?.clip(&range)?;
            next = part.end();
            Some(part)
        })
    }

    fn seek(&mut self, page: PageIndex) -> Option<Extent> {
        if page >= self.extent.end() {
            for _ in 0..STEPS {
                if page < self.advance()?.end() {
                    return Some(self.extent);
                }
            }
        }
        let position = self.map.position(page)?;
        self.go(position)
    }

    fn go(&mut self, position: usize) -> Option<Extent> {
        if position >= self.map.extent_count() {
            return None;
        }
        self.position = position;
        self.extent = self.map.extent_at(position);
        Some(self.extent)
    }
}

impl<I: Iterator<Item = Extent>> Iterator for OriginRuns<I> {
    type Item = OriginRun;

    fn next(&mut self) -> Option<OriginRun> {
        let first = self.extents.next()?;
        let mut pages = first.pages;
        while let Some(more) = self.extents.next_if(|next| next.origin == first.origin) {
            pages = pages + more.pages;
        }
        Some(OriginRun {
            start: first.start,
            pages,
            origin: first.origin,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::build_id::BuildId;
    use crate::map_encode::{MapContent, encode_map};
    use crate::map_header::BuildEntry;
    use crate::units::{Generation, PageSize};

    /// A map of extents of these lengths and origins (0 is zero memory); storage is scattered.
    fn map(extents: &[(u64, u16)]) -> MemoryMap {
        let builds: Vec<_> = (0u8..3)
            .map(|number| BuildEntry {
                id: BuildId::from_bytes([number + 1; 16]),
                generation: Generation::new(number.into()),
                data_pages: PageCount::new(1 << 20),
                sums_crc: 0,
            })
            .collect();
        let mut start = PageIndex::new(0);
        let mut list = Vec::new();
        for (number, &(pages, origin)) in (0..).zip(extents) {
            let origin = origin.checked_sub(1).map_or(Origin::Zero, Origin::Build);
            let storage = if origin == Origin::Zero {
                0
            } else {
                number * 100
            };
            let (pages, storage) = (PageCount::new(pages), PageIndex::new(storage));
            list.push(Extent {
                start,
                pages,
                origin,
                storage,
            });
            start = start + pages;
        }
        let bytes = encode_map(&MapContent {
            page_size: PageSize::Size4K,
            memory_pages: start - PageIndex::new(0),
            parent: Some(BuildId::from_bytes([2; 16])),
            builds: &builds,
            extents: &list,
        });
        MemoryMap::from_bytes(bytes, Path::new("map")).unwrap()
    }

    fn extents() -> impl Strategy<Value = Vec<(u64, u16)>> {
        prop::collection::vec((1u64..6, 0u16..4), 1..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn cursor_finds_what_lookup_finds_in_any_order(
            extents in extents(),
            pages in prop::collection::vec(0u64..200, 1..100),
            ascending in any::<bool>(),
        ) {
            let map = map(&extents);
            let mut pages = pages;
            if ascending {
                pages.sort_unstable();
            }
            let mut cursor = map.cursor();
            for page in pages.into_iter().map(PageIndex::new) {
                prop_assert_eq!(cursor.lookup(page), map.lookup(page));
            }
        }

        #[test]
        fn ranges_from_a_cursor_are_those_of_the_map(
            extents in extents(),
            ranges in prop::collection::vec((0u64..200, 0u64..40), 1..30),
        ) {
            let map = map(&extents);
            let mut cursor = map.cursor();
            for (start, pages) in ranges {
                let range = PageIndex::new(start)..PageIndex::new(start + pages);
                let expected: Vec<_> = map.extents(range.clone()).collect();
                prop_assert_eq!(cursor.range(range).collect::<Vec<_>>(), expected);
            }
        }

        #[test]
        fn origin_runs_are_the_pages_of_the_range_by_origin(
            extents in extents(),
            start in 0u64..200,
            pages in 0u64..200,
        ) {
            let map = map(&extents);
            let range = PageIndex::new(start)..PageIndex::new(start + pages);
            let runs: Vec<_> = map.origin_runs(range.clone()).collect();
            for pair in runs.windows(2) {
                prop_assert_eq!(pair[0].start + pair[0].pages, pair[1].start);
                prop_assert_ne!(pair[0].origin, pair[1].origin);
            }
            let by_run = runs.iter().flat_map(|run| {
                (0..run.pages.get()).map(|page| (run.start.get() + page, run.origin))
            });
            let end = range.end.get().min(map.memory_pages().get());
            let by_page = (start..end).map(|page| {
                (page, map.lookup(PageIndex::new(page)).unwrap().origin)
            });
            prop_assert!(by_run.eq(by_page));
        }
    }

    #[test]
    fn advance_walks_every_extent_once_and_stays_at_the_last() {
        let map = map(&[(1, 0), (2, 1), (3, 2), (1, 0)]);
        let mut cursor = map.cursor();
        let mut walked = vec![cursor.extent()];
        walked.extend(std::iter::from_fn(|| cursor.advance()));
        assert_eq!(walked, map.all_extents().collect::<Vec<_>>());
        assert_eq!(cursor.extent(), walked[3]);
    }
}
