//! A run of consecutive pages with one origin, and its 16-byte record.
//!
//! ```text
//!  0        4        8        12    14    16
//!  +--------+--------+--------+-----+-----+
//!  | start  | pages  |storage |origin| 0  |   little-endian u32, u32, u32, u16, u16
//!  +--------+--------+--------+-----+-----+
//! ```
//!
//! `origin` 0 is zero memory, `k` is entry `k - 1` of the build table.

use std::ops::Range;

use crate::le::{bytes_at, u32_at};
use crate::units::{PageCount, PageIndex};

/// The size of an extent's record in a map.
pub const EXTENT_BYTES: usize = 16;

/// The most pages that one record describes; longer runs take several.
pub(crate) const MAX_RECORD_PAGES: u64 = u32::MAX as u64;

/// Where the content of a page comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// Every byte is zero; nothing is stored.
    Zero,
    /// The `memory.data` of a build, by index into [`MemoryMap::builds`](crate::MemoryMap::builds).
    Build(u16),
}

/// A run of consecutive pages with one origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first page, in guest memory.
    pub start: PageIndex,
    /// How many pages; at least one.
    pub pages: PageCount,
    /// Where their content is.
    pub origin: Origin,
    /// The position of the first page in the origin's `memory.data`; 0 for zero memory.
    pub storage: PageIndex,
}

impl Extent {
    pub(crate) fn zero(pages: Range<PageIndex>) -> Self {
        Self {
            start: pages.start,
            pages: pages.end - pages.start,
            origin: Origin::Zero,
            storage: PageIndex::new(0),
        }
    }

    /// The page after the last.
    pub fn end(&self) -> PageIndex {
        self.start + self.pages
    }

    /// Where `page` of this extent is in the origin's `memory.data`; 0 for zero memory.
    ///
    /// # Panics
    /// If the page lies before the extent.
    pub fn storage_of(&self, page: PageIndex) -> PageIndex {
        match self.origin {
            Origin::Zero => PageIndex::new(0),
            Origin::Build(_) => self.storage + (page - self.start),
        }
    }

    /// The part of this extent inside `range`, if there is any.
    pub fn clip(&self, range: &Range<PageIndex>) -> Option<Self> {
        let start = self.start.max(range.start);
        let end = self.end().min(range.end);
        (start < end).then(|| Self {
            start,
            pages: end - start,
            origin: self.origin,
            storage: self.storage_of(start),
        })
    }

    /// Whether `next` continues this extent in memory *and* in storage, so that one extent can
    /// describe both.
    fn continues_in(&self, next: &Self) -> bool {
        self.end() == next.start
            && self.origin == next.origin
            && (self.origin == Origin::Zero || self.storage + self.pages == next.storage)
    }

    /// The extent of a record that was validated.
    #[inline]
    pub(crate) fn decode(record: &[u8; EXTENT_BYTES]) -> Self {
        let origin = u16::from_le_bytes(bytes_at(record, 12));
        Self {
            start: PageIndex::new(record_start(record)),
            pages: PageCount::new(u64::from(u32_at(record, 4))),
            origin: origin.checked_sub(1).map_or(Origin::Zero, Origin::Build),
            storage: PageIndex::new(u64::from(u32_at(record, 8))),
        }
    }

    /// Appends the records of this extent: one, or several for a run over 2^32 - 1 pages.
    pub(crate) fn encode(&self, records: &mut Vec<u8>) {
        let mut rest = *self;
        while !rest.pages.is_zero() {
            let pages = rest.pages.get().min(MAX_RECORD_PAGES);
            let origin = match rest.origin {
                Origin::Zero => 0,
                Origin::Build(index) => index
                    .checked_add(1)
                    .expect("a table that is encoded has at most 65,535 entries"),
            };
            let words = [
                narrow(rest.start.get()),
                narrow(pages),
                narrow(rest.storage.get()),
                u32::from(origin),
            ];
            records.extend_from_slice(words.map(u32::to_le_bytes).as_flattened());
            let next = rest.start + PageCount::new(pages);
            rest = Self {
                start: next,
                pages: rest.end() - next,
                storage: rest.storage_of(next),
                ..rest
            };
        }
    }
}

/// The first page of a record, which is what a search compares.
#[inline]
pub(crate) fn record_start(record: &[u8; EXTENT_BYTES]) -> u64 {
    u64::from(u32_at(record, 0))
}

fn narrow(value: u64) -> u32 {
    u32::try_from(value).expect("memory of at most 2^32 pages has 32-bit page numbers")
}

/// Appends an extent, merged with the last one where both are one run.
pub(crate) fn push_merged(extents: &mut Vec<Extent>, extent: Extent) {
    match extents.last_mut() {
        Some(last) if last.continues_in(&extent) => last.pages = last.pages + extent.pages,
        _ => extents.push(extent),
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

    fn merged(extents: &[Extent]) -> usize {
        let mut list = Vec::new();
        extents.iter().for_each(|&e| push_merged(&mut list, e));
        list.len()
    }

    #[test]
    fn neighbours_whose_storage_is_not_contiguous_stay_apart() {
        let build = Origin::Build(0);
        assert_eq!(merged(&[extent(0, 2, build, 7), extent(2, 1, build, 9)]), 1);
        assert_eq!(merged(&[extent(0, 2, build, 7), extent(2, 1, build, 8)]), 2);
        assert_eq!(merged(&[extent(0, 2, build, 7), extent(2, 1, build, 7)]), 2);
    }

    #[test]
    fn neighbours_of_different_origin_stay_apart() {
        let pair = [
            extent(0, 2, Origin::Build(0), 0),
            extent(2, 1, Origin::Build(1), 2),
        ];
        assert_eq!(merged(&pair), 2);
        let pair = [extent(0, 2, Origin::Zero, 0), extent(2, 1, Origin::Zero, 0)];
        assert_eq!(merged(&pair), 1);
    }

    #[test]
    fn run_over_the_record_limit_is_split() {
        let mut records = Vec::new();
        extent(0, 1 << 32, Origin::Zero, 0).encode(&mut records);
        let decoded: Vec<_> = records.as_chunks().0.iter().map(Extent::decode).collect();
        let split = [
            extent(0, u64::from(u32::MAX), Origin::Zero, 0),
            extent(u64::from(u32::MAX), 1, Origin::Zero, 0),
        ];
        assert_eq!(decoded, split);
    }

    #[test]
    fn clipped_extent_keeps_every_page_where_it_is() {
        let whole = extent(10, 10, Origin::Build(3), 100);
        let range = PageIndex::new(12)..PageIndex::new(15);
        assert_eq!(
            whole.clip(&range),
            Some(extent(12, 3, Origin::Build(3), 102))
        );
        assert_eq!(whole.clip(&(PageIndex::new(20)..PageIndex::new(30))), None);
    }
}
