//! Materialising a guest's whole memory in the background, at a bounded rate.
//!
//! Pages that are zero in the build are left absent, and so is what was given back: they cost
//! nothing until somebody asks. What is installed is `Clean`, so a pause that stops this half
//! way finds a guest like any other.

use std::ops::Range;
use std::time::{Duration, Instant};

use snapshot_format::{Origin, PageIndex};

use crate::page_state::{PageState, PageStates};
use crate::replay::MAX_RUN_BYTES;
use crate::source::PageSource;

/// How many pages are looked at in one step, so that a memory full of zeros or installed pages
/// doesn't keep others waiting.
const MAX_LOOK: u64 = 4096;

/// One materialisation.
#[derive(Debug)]
pub(crate) struct Loader {
    cursor: u64,
    pub(crate) bytes_per_second: u64,
    /// Not before this.
    due: Instant,
    pub(crate) pages: u64,
}

/// What is to be done now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// Install these pages.
    Run(Range<u64>),
    /// Nothing in the part that was looked at; go on.
    Again,
    /// Nothing before this.
    Wait(Instant),
    /// All of it is there.
    Done,
}

impl Loader {
    pub(crate) fn new(bytes_per_second: u64, now: Instant) -> Self {
        Self {
            cursor: 0,
            bytes_per_second: bytes_per_second.max(1),
            due: now,
            pages: 0,
        }
    }

    /// The next run of missing pages that the build stores.
    pub(crate) fn next(&mut self, source: &PageSource, states: &PageStates, now: Instant) -> Load {
        if now < self.due {
            return Load::Wait(self.due);
        }
        let end = states.pages().get();
        let page_bytes = source.page_size().bytes();
        let most = (MAX_RUN_BYTES / page_bytes).max(1);
        let stop = end.min(self.cursor + MAX_LOOK);
        while self.cursor < stop {
            let extent = source.extent(PageIndex::new(self.cursor));
            let extent_end = extent.end().get().min(end);
            if extent.origin == Origin::Zero {
                self.cursor = extent_end;
                continue;
            }
            let missing = |page: &u64| states.get(PageIndex::new(*page)) == PageState::Missing;
            let Some(start) = (self.cursor..extent_end.min(stop)).find(missing) else {
                self.cursor = extent_end.min(stop);
                continue;
            };
            let longest = start..extent_end.min(start + most);
            let pages = longest.take_while(missing).count() as u64;
            self.cursor = start + pages;
            self.pay(pages * page_bytes, now);
            return Load::Run(start..self.cursor);
        }
        if self.cursor >= end {
            Load::Done
        } else {
            Load::Again
        }
    }

    /// A run was refused: again from there, a little later.
    pub(crate) fn put_back(&mut self, start: u64, now: Instant) {
        self.cursor = self.cursor.min(start);
        self.due = self.due.max(now + Duration::from_millis(1));
    }

    /// When its next run may be installed.
    pub(crate) fn due(&self) -> Instant {
        self.due
    }

    fn pay(&mut self, bytes: u64, now: Instant) {
        let cost = Duration::from_nanos(
            (u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second)) as u64,
        );
        self.due = self.due.max(now) + cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot_format::{PageCount, PageSize};
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_rate_is_kept_and_zero_present_and_removed_pages_are_passed_over() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(256 * 4096).unwrap();
        file.as_file()
            .write_all_at(&vec![1; 100 * 4096], 100 * 4096)
            .unwrap();
        let source = PageSource::open_plain(file.path(), PageSize::Size4K).unwrap();
        let states = PageStates::create(PageCount::new(256)).unwrap();
        states.set(PageIndex::new(110), PageState::Clean);
        states.set(PageIndex::new(111), PageState::Removed);
        let start = Instant::now();
        // 64 pages a second.
        let mut loader = Loader::new(64 * 4096, start);
        assert_eq!(loader.next(&source, &states, start), Load::Run(100..110));
        let ten = start + Duration::from_secs(10) / 64;
        assert_eq!(loader.next(&source, &states, start), Load::Wait(ten));
        assert_eq!(loader.next(&source, &states, ten), Load::Run(112..176));
        let later = ten + Duration::from_secs(1);
        assert_eq!(loader.next(&source, &states, ten), Load::Wait(later));
        loader.put_back(170, later);
        let again = later + Duration::from_millis(1);
        assert_eq!(loader.next(&source, &states, again), Load::Run(170..200));
        let end = again + Duration::from_secs(9);
        assert_eq!(loader.next(&source, &states, end), Load::Done);
    }
}
