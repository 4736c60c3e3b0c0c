//! A table of contents over the extents: one hop to a handful of neighbours.
//!
//! Memory is cut into equal buckets, about one per four extents; the table holds the position
//! of the extent that covers the first page of each bucket. A lookup reads two entries of this
//! table and searches the few records between them, where a search over all of a million
//! records would miss the cache a dozen times. It is built in memory while the extents are
//! validated, so it costs nothing on disk and can't disagree with them.

use std::ops::RangeInclusive;

use crate::units::{PageCount, PageIndex};

/// How many extents share a bucket on average.
const EXTENTS_PER_BUCKET: u64 = 4;

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
    /// The pages of a bucket less one.
    round_up: u64,
    /// The extent that is taken next.
    position: u32,
    /// The last extent that begins between the first pages of the bucket before and of this one;
    /// 0 if none does.
    begun: Vec<u32>,
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
            round_up: (1 << shift) - 1,
            position: 0,
            begun: vec![0; buckets + 1],
        }
    }

    /// Takes the first pages of the next extents; they cover the memory without gaps, in order,
    /// or else the index is never asked.
    ///
    /// Branches only where it never does: which extent is the first of a bucket is
    /// unpredictable. The position lives in a register; in the builder, every write to the table
    /// would make the compiler read it anew.
    pub(crate) fn push_all(&mut self, start_pages: impl Iterator<Item = u64>) {
        let (shift, round_up) = (self.shift, self.round_up);
        let (begun, mut position) = (self.begun.as_mut_slice(), self.position);
        for start_page in start_pages {
            let bucket = (start_page + round_up) >> shift;
            if let Some(begun) = begun.get_mut(bucket as usize) {
                *begun = position;
            }
            position = position.wrapping_add(1);
        }
        self.position = position;
    }

    pub(crate) fn finish(self) -> TopIndex {
        let mut first = self.begun;
        let mut last = 0;
        for position in &mut first {
            last = last.max(*position);
            *position = last;
        }
        TopIndex {
            shift: self.shift,
            first,
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
        builder.push_all(
            [0].into_iter()
                .chain(ends[..ends.len() - 1].iter().copied()),
        );
        builder.finish()
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
