//! Replaying a working set: its pages in first-touch order, in growing runs, as long as it pays.
//!
//! Whether it pays can't be seen from the pages that it installs: they don't fault any more. So
//! one page in [`CONTROL`] is left out, and its fault, if it comes, stands for the others:
//!
//! ```text
//!   set   ▓▓▓▓▓▓▓▓▓▓▓░▓▓▓▓▓▓▓▓▓▓▓░▓▓▓▓▓▓▓▓        ░ left out: its fault is a hit,
//!                        ▲ cursor                   its silence is waste
//!   demand faults: in the set (not yet there, or left out) or not; of the last 16, fewer than
//!   4 in the set end the replay
//! ```
//!
//! It also goes no further than it has credit: each fault in the set gives more of it than the
//! one before, and so does time in which nobody waits. So a wrong set costs a few pages and not
//! the time until it is found out, even where guest and worker share a core.

use std::ops::Range;

use snapshot_format::{PageIndex, PageRun};

use crate::page_state::{PageState, PageStates};

/// The most bytes that are installed at once behind a demand fault.
pub(crate) const MAX_RUN_BYTES: u64 = 256 << 10;
/// How much is installed at first: a set that is wrong is found out before it costs much.
const FIRST_RUN_PAGES: u64 = 4;
/// Of so many pages, one is left out.
const CONTROL: u64 = 128;
/// Pages that may be installed before anybody has asked for anything.
const FIRST_CREDIT: u64 = 16;
/// How fast credit grows with faults in the set, and with time without faults.
const GROWTH: u64 = 4;
/// How many of the last demand faults decide.
const RECENT: u32 = 16;
/// Fewer of those in the set, and it doesn't pay.
const MIN_IN_SET: u32 = 4;

/// One replay. Its bits are the only memory that grows with the guest's.
#[derive(Debug)]
pub(crate) struct Replay {
    runs: Vec<PageRun>,
    /// The run that is being replayed, and how far.
    run: usize,
    into: u64,
    /// What was handed out and could not be installed then.
    put_back: Option<Range<u64>>,
    /// Pages of the set before the cursor.
    passed: u64,
    run_pages: u64,
    max_run_pages: u64,
    in_set: PageBits,
    left_out: PageBits,
    /// The last demand faults, one bit each: whether they were in the set.
    recent: u16,
    seen: u32,
    stopped: bool,
    /// Pages that may be installed now, and how many the next reason gives.
    credit: u64,
    grant: u64,
    controls: u64,
    control_hits: u64,
    installed: u64,
}

impl Replay {
    /// A replay for memory of `pages` pages of `page_bytes` bytes; pages outside are left out.
    pub(crate) fn new(runs: Vec<PageRun>, pages: u64, page_bytes: u64) -> Self {
        let mut in_set = PageBits::new(pages);
        let mut kept = runs;
        kept.retain(|run| run.start.get() + run.pages.get() <= pages);
        for page in kept.iter().flat_map(crate::recording::pages_of) {
            in_set.set(page.get());
        }
        let max_run_pages = (MAX_RUN_BYTES / page_bytes).max(1);
        Self {
            runs: kept,
            run: 0,
            into: 0,
            put_back: None,
            passed: 0,
            run_pages: FIRST_RUN_PAGES.min(max_run_pages),
            max_run_pages,
            in_set,
            left_out: PageBits::new(pages),
            recent: 0,
            seen: 0,
            stopped: false,
            credit: FIRST_CREDIT,
            grant: FIRST_CREDIT,
            controls: 0,
            control_hits: 0,
            installed: 0,
        }
    }

    /// A demand fault of the guest.
    pub(crate) fn note_fault(&mut self, page: PageIndex, state: PageState) {
        let in_set = self.in_set.has(page.get());
        self.recent = self.recent << 1 | u16::from(in_set);
        self.seen = self.seen.saturating_add(1);
        if in_set {
            self.give_credit();
        } else {
            self.grant = (self.grant / 2).max(FIRST_CREDIT);
        }
        if state == PageState::Missing && self.left_out.has(page.get()) {
            self.control_hits += 1;
        }
        if !self.is_over() && self.seen >= RECENT && self.recent.count_ones() < MIN_IN_SET {
            self.stopped = true;
        }
    }

    /// A fault in the set, or time without any.
    pub(crate) fn give_credit(&mut self) {
        self.credit = self.credit.saturating_add(self.grant);
        self.grant = self.grant.saturating_mul(GROWTH);
    }

    /// Whether it has to wait for credit.
    pub(crate) fn waits(&self) -> bool {
        self.credit == 0 && !self.is_over()
    }

    /// The next run of missing pages to install; `None` when it is over.
    pub(crate) fn next_run(&mut self, states: &PageStates) -> Option<Range<u64>> {
        if let Some(range) = self.put_back.take() {
            return Some(range);
        }
        let mut found: Option<Range<u64>> = None;
        while !self.stopped {
            let Some(run) = self.runs.get(self.run) else {
                break;
            };
            if self.into == run.pages.get() {
                self.run += 1;
                self.into = 0;
                if found.is_some() {
                    break;
                }
                continue;
            }
            let page = run.start.get() + self.into;
            let missing = states.get(PageIndex::new(page)) == PageState::Missing;
            let left_out = missing && is_control(self.passed);
            if missing && !left_out {
                let range = found.get_or_insert(page..page);
                range.end = page + 1;
            }
            if left_out {
                self.controls += 1;
                self.left_out.set(page);
            }
            self.into += 1;
            self.passed += 1;
            let full = |range: &Range<u64>| range.end - range.start == self.run_pages;
            if (!missing || left_out) && found.is_some() || found.as_ref().is_some_and(full) {
                break;
            }
        }
        if found.is_some() {
            self.run_pages = (self.run_pages * 2).min(self.max_run_pages);
        }
        let pages = found.as_ref().map_or(0, |range| range.end - range.start);
        self.credit = self.credit.saturating_sub(pages);
        found
    }

    /// A part of a run that could not be installed now: it comes again.
    pub(crate) fn put_back(&mut self, pages: Range<u64>) {
        self.put_back = Some(pages);
    }

    /// Pages that came of it.
    pub(crate) fn note_installed(&mut self, pages: u64) {
        self.installed += pages;
    }

    /// Whether there is nothing left to do.
    pub(crate) fn is_over(&self) -> bool {
        self.stopped || (self.run == self.runs.len() && self.put_back.is_none())
    }

    /// What it has done so far.
    pub(crate) fn tally(&self) -> ReplayTally {
        let judged = self.installed * self.control_hits.min(self.controls);
        let hits = judged.checked_div(self.controls);
        ReplayTally {
            pages: self.installed,
            hits: hits.unwrap_or(0),
            waste: hits.map_or(0, |hits| self.installed - hits),
            stopped_early: self.stopped,
        }
    }
}

/// One bit for each page of the memory.
#[derive(Debug)]
struct PageBits(Vec<u64>);

impl PageBits {
    fn new(pages: u64) -> Self {
        Self(vec![0; pages.div_ceil(64) as usize])
    }

    fn has(&self, page: u64) -> bool {
        self.0[(page / 64) as usize] >> (page % 64) & 1 != 0
    }

    fn set(&mut self, page: u64) {
        self.0[(page / 64) as usize] |= 1 << (page % 64);
    }
}

/// Whether the page at this position of the set is left out: not the first ones, which are
/// wanted at once.
fn is_control(position: u64) -> bool {
    position % CONTROL == CONTROL - 1
}

/// What a replay did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReplayTally {
    /// Pages installed.
    pub(crate) pages: u64,
    /// Of those, about how many the guest has asked for, judged by the pages left out.
    pub(crate) hits: u64,
    /// And how many it hasn't.
    pub(crate) waste: u64,
    /// It didn't pay.
    pub(crate) stopped_early: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot_format::PageCount;

    fn run(start: u64, pages: u64) -> PageRun {
        PageRun {
            start: PageIndex::new(start),
            pages: PageCount::new(pages),
        }
    }

    fn all_runs(replay: &mut Replay, states: &PageStates) -> Vec<Range<u64>> {
        std::iter::from_fn(|| {
            let run = replay.next_run(states)?;
            let pages = PageCount::new(run.end - run.start);
            states.set_run(PageIndex::new(run.start), pages, PageState::Clean);
            Some(run)
        })
        .collect()
    }

    #[test]
    fn runs_grow_in_first_touch_order_and_leave_one_page_in_128_out() {
        let states = PageStates::create(PageCount::new(1024)).unwrap();
        let mut replay = Replay::new(vec![run(500, 2), run(0, 200)], 1024, 4096);
        let runs = all_runs(&mut replay, &states);
        assert_eq!(runs[..3], [500..502, 0..8, 8..24]);
        assert!(runs.iter().all(|run| run.end - run.start <= 64));
        let installed: u64 = runs.iter().map(|run| run.end - run.start).sum();
        assert_eq!(installed, 202 - 1);
        assert!(replay.is_over());
    }

    #[test]
    fn pages_that_are_there_already_and_pages_outside_are_passed_over() {
        let states = PageStates::create(PageCount::new(64)).unwrap();
        states.set(PageIndex::new(3), PageState::Removed);
        let mut replay = Replay::new(vec![run(0, 6), run(60, 10)], 64, 4096);
        assert_eq!(all_runs(&mut replay, &states), [0..3, 4..6]);
    }

    #[test]
    fn a_set_that_nobody_asks_for_is_given_up_after_16_faults() {
        let states = PageStates::create(PageCount::new(4096)).unwrap();
        let mut replay = Replay::new(vec![run(0, 2048)], 4096, 4096);
        for page in 3000..3015 {
            replay.note_fault(PageIndex::new(page), PageState::Missing);
            assert!(!replay.is_over());
        }
        replay.note_fault(PageIndex::new(3015), PageState::Missing);
        assert!(replay.is_over() && replay.tally().stopped_early);
        assert!(replay.next_run(&states).is_none());
    }

    #[test]
    fn faults_in_the_set_keep_it_going() {
        let mut replay = Replay::new(vec![run(0, 2048)], 4096, 4096);
        for page in 0..64 {
            let page = if page % 4 == 0 { page } else { 3000 + page };
            replay.note_fault(PageIndex::new(page), PageState::Missing);
        }
        assert!(!replay.is_over());
    }

    #[test]
    fn pages_left_out_stand_for_the_others() {
        let states = PageStates::create(PageCount::new(1024)).unwrap();
        let mut replay = Replay::new(vec![run(0, 512)], 1024, 4096);
        for run in all_runs(&mut replay, &states) {
            replay.note_installed(run.end - run.start);
        }
        // Four were left out; three of them are asked for.
        for page in [127, 255, 511] {
            replay.note_fault(PageIndex::new(page), PageState::Missing);
        }
        let tally = replay.tally();
        assert_eq!((tally.pages, tally.hits, tally.waste), (508, 381, 127));
    }

    #[test]
    fn credit_grows_with_faults_in_the_set_and_shrinks_with_others() {
        let states = PageStates::create(PageCount::new(4096)).unwrap();
        let mut replay = Replay::new(vec![run(0, 2048)], 4096, 4096);
        let spend = |replay: &mut Replay| {
            let mut pages = 0;
            while !replay.waits() {
                let run = replay.next_run(&states).unwrap();
                pages += run.end - run.start;
            }
            pages
        };
        // Whole runs: the last may be longer than what was left.
        assert!((16..32).contains(&spend(&mut replay)));
        replay.note_fault(PageIndex::new(100), PageState::Missing);
        let first = spend(&mut replay);
        replay.note_fault(PageIndex::new(200), PageState::Missing);
        let second = spend(&mut replay);
        assert!(first >= 16 && second > first, "{first}, then {second}");
        replay.note_fault(PageIndex::new(3000), PageState::Missing);
        assert!(replay.waits());
    }
}
