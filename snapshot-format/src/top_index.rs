//! A table of contents over the extents: two hops to one cache line of records.
//!
//! ```text
//!  page ─▶ groups (one entry per bucket of memory) ─▶ leaders (one per line of records) ─▶ line
//!          which leader begins before the bucket      a run of them is compared at once
//! ```
//!
//! A *line* is the four extents that share 64 bytes of the file, its *leader* the first page of
//! its first one. All leaders of a million extents are 1 MiB and stay in a near cache, so that a
//! lookup fetches one line from far away; a search over the records would fetch a dozen. The
//! table is built in memory while the extents are validated: it costs nothing on disk and can't
//! disagree with them.

use crate::extent::EXTENT_BYTES;
use crate::units::{PageCount, PageIndex};

/// Extents in a line.
pub(crate) const LINE: usize = 64 / EXTENT_BYTES;
/// Leaders per bucket, on average.
const GROUP: usize = 4;
/// Leaders that are compared with a page at once: those of two groups, in which it usually is,
/// and as many again.
const WINDOW: usize = 16;

#[derive(Debug)]
pub(crate) struct TopIndex {
    /// A page belongs to bucket `page >> shift`.
    shift: u32,
    /// For each bucket a leader at or before its first page; then the last one.
    buckets: Vec<u32>,
    /// The first page of each line, ascending from 0.
    leaders: Vec<u32>,
    /// Extents that are missing from the first line.
    skew: usize,
}

/// How many extents the first line lacks, if they begin at this byte of a file.
pub(crate) fn skew(extents_at: usize) -> usize {
    extents_at / EXTENT_BYTES % LINE
}

impl TopIndex {
    /// For a memory of at most 2^32 pages and at least one; `leaders` are the first pages of its
    /// lines.
    pub(crate) fn new(memory_pages: PageCount, leaders: Vec<u32>, skew: usize) -> Self {
        let target = (leaders.len() / GROUP).max(1) as u64;
        let last_page = memory_pages.get() - 1;
        let mut shift = 0;
        while (last_page >> shift) + 1 > target {
            shift += 1;
        }
        let count = usize::try_from((last_page >> shift) + 1).expect("fewer buckets than leaders");
        let mut buckets = Vec::with_capacity(count + 1);
        for (group, start) in leaders.iter().step_by(GROUP).enumerate() {
            // Buckets that begin before this leader have an earlier one.
            let bucket = (u64::from(*start) + (1 << shift) - 1) >> shift;
            let before = group.saturating_sub(1) * GROUP;
            let bucket = usize::try_from(bucket).expect("a bucket per page");
            buckets.resize(bucket.max(buckets.len()), narrow(before));
        }
        let last_group = (leaders.len() - 1) / GROUP * GROUP;
        buckets.resize(count.max(buckets.len()), narrow(last_group));
        buckets.push(narrow(leaders.len() - 1));
        Self {
            shift,
            buckets,
            leaders,
            skew,
        }
    }

    /// The position of the first extent in the line of a page that lies in the memory.
    #[inline]
    pub(crate) fn line_of(&self, page: PageIndex) -> usize {
        let bucket = usize::try_from(page.get() >> self.shift).expect("a bucket per 64-bit page");
        let first = self.buckets[bucket] as usize;
        let leader = match self.leaders[first..].first_chunk::<WINDOW>() {
            Some(window) => {
                // All of them: a branch that ends the count would be mispredicted every time.
                let begun = begun(window, page);
                if begun < WINDOW {
                    first + begun - 1
                } else {
                    self.search(page, first)
                }
            }
            None => self.search(page, first),
        };
        (leader * LINE).saturating_sub(self.skew)
    }

    /// The leader of a page among those from `first` on, however many begin in a bucket.
    #[cold]
    fn search(&self, page: PageIndex, first: usize) -> usize {
        let rest = &self.leaders[first..];
        first + rest.partition_point(|leader| u64::from(*leader) <= page.get()) - 1
    }
}

/// How many of these begin at or before a page.
#[inline(always)]
fn begun(leaders: &[u32; WINDOW], page: PageIndex) -> usize {
    let page = u32::try_from(page.get()).expect("memory has at most 2^32 pages");
    let begun = leaders.iter().map(|leader| u32::from(*leader <= page));
    begun.sum::<u32>() as usize
}

fn narrow(leader: usize) -> u32 {
    u32::try_from(leader).expect("at most 2^30 leaders")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the line of every extent's first and last page.
    fn check(ends: &[u64], skew: usize) {
        let starts: Vec<u64> = [0].into_iter().chain(ends.iter().copied()).collect();
        let starts = &starts[..ends.len()];
        let leads = |position: usize| position == 0 || (position + skew).is_multiple_of(LINE);
        let leaders = (0..starts.len()).filter(|position| leads(*position));
        let leaders = leaders.map(|position| u32::try_from(starts[position]).unwrap());
        let pages = PageCount::new(*ends.last().unwrap());
        let index = TopIndex::new(pages, leaders.collect(), skew);
        for (position, end) in ends.iter().enumerate() {
            let line = (0..=position).rev().find(|position| leads(*position));
            for page in [starts[position], end - 1] {
                let found = index.line_of(PageIndex::new(page));
                assert_eq!(Some(found), line, "page {page} of {ends:?}");
            }
        }
    }

    #[test]
    fn line_of_a_page_is_found_however_extents_lie() {
        let single: Vec<u64> = (1..=1000).collect();
        let crowded: Vec<u64> = (1..=640).chain([1 << 32]).collect();
        let late: Vec<u64> = (0..900).map(|i| (1 << 30) + i).collect();
        let sparse: Vec<u64> = (1..=400).map(|i| i * 1000 + i % 7).collect();
        let gaps = (1..=999).map(|i| i + 5000 * (i / 90) + 700_000 * (i / 400));
        for ends in [
            vec![1],
            vec![1 << 32],
            single,
            crowded,
            late,
            sparse,
            gaps.collect(),
        ] {
            for skew in [0, 2] {
                check(&ends, skew);
            }
        }
    }
}
