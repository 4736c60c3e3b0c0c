//! A table of contents over the extents: one hop to a handful of neighbours.
//!
//! Memory is cut into equal buckets, about one per eight extents; the table holds the position
//! of the extent that covers the first page of each bucket. A lookup reads two entries of this
//! table and searches the few records between them, where a search over all of a million
//! records would miss the cache a dozen times. It is built in memory while the extents are
//! validated, so it costs nothing on disk and can't disagree with them.

use std::ops::RangeInclusive;

use crate::units::{PageCount, PageIndex};

/// How many extents share a bucket on average.
const EXTENTS_PER_BUCKET: u64 = 8;

#[derive(Debug)]
pub(crate) struct TopIndex {
    /// A page belongs to bucket `page >> shift`.
    shift: u32,
    /// For each bucket the extent that covers its first page; then the last extent.
    first: Vec<u32>,
}

/// A [`TopIndex`] that is being filled.
#[derive(Debug)]
pub(crate) struct TopIndexBuilder {
    shift: u32,
    first: Vec<u32>,
    buckets: usize,
    /// The first page of the bucket whose extent is not known yet.
    next_page: u64,
}

impl TopIndexBuilder {
    /// For a memory of at most 2^32 pages and at least one.
    pub(crate) fn new(memory_pages: PageCount, extent_count: usize) -> Self {
        let target = (extent_count as u64 / EXTENTS_PER_BUCKET).max(1);
        let last_page = memory_pages.get() - 1;
        let mut shift = 0;
        while (last_page >> shift) + 1 > target {
            shift += 1;
        }
        let buckets =
            usize::try_from((last_page >> shift) + 1).expect("fewer buckets than extents");
        Self {
            shift,
            first: Vec::with_capacity(buckets + 1),
            buckets,
            next_page: 0,
        }
    }

    /// Takes the next extent; they cover the memory without gaps, in order.
    #[inline]
    pub(crate) fn push(&mut self, position: u32, end_page: u64) {
        while self.next_page < end_page && self.first.len() < self.buckets {
            self.first.push(position);
            self.next_page += 1 << self.shift;
        }
    }

    pub(crate) fn finish(mut self, last_position: u32) -> TopIndex {
        self.first.push(last_position);
        TopIndex {
            shift: self.shift,
            first: self.first,
        }
    }
}

impl TopIndex {
    /// The positions among which the extent of `page` is; the page lies in the memory.
    #[inline]
    pub(crate) fn candidates(&self, page: PageIndex) -> RangeInclusive<usize> {
        let bucket = usize::try_from(page.get() >> self.shift).expect("a bucket per 64-bit page");
        self.first[bucket] as usize..=self.first[bucket + 1] as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(ends: &[u64]) -> TopIndex {
        let pages = PageCount::new(*ends.last().unwrap());
        let mut builder = TopIndexBuilder::new(pages, ends.len());
        for (position, &end) in (0..).zip(ends) {
            builder.push(position, end);
        }
        builder.finish(u32::try_from(ends.len() - 1).unwrap())
    }

    #[test]
    fn candidates_always_contain_the_extent_of_the_page() {
        let single: Vec<u64> = (1..=100).collect();
        let crowded: Vec<u64> = (1..=64).chain([1 << 32]).collect();
        let sparse: Vec<u64> = (1..=40).map(|i| i * 1000 + i % 7).collect();
        for ends in [vec![1], vec![1 << 32], single, crowded, sparse] {
            let index = index(&ends);
            for (position, &end) in ends.iter().enumerate() {
                let start = if position == 0 { 0 } else { ends[position - 1] };
                for page in [start, end - 1] {
                    let candidates = index.candidates(PageIndex::new(page));
                    assert!(candidates.contains(&position), "page {page} of {ends:?}");
                }
            }
        }
    }
}
