//! Faults that the kernel refused for now (`EAGAIN`): parked, and tried again after a
//! short and growing pause, while their worker goes on with other work.
//!
//! `EAGAIN` means that the guest's memory map is changing: a `REMOVE` is unread, or its
//! `madvise` has not finished. Spinning would keep that thread from running; waiting
//! for another event might wait for ever. The list is bounded by being a set of pages
//! with one entry each; past its bound a fault is not dropped but bounced: waking its
//! thread makes the kernel report it anew.

use std::time::{Duration, Instant};

use snapshot_format::PageIndex;

const FIRST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(2);
/// More parked faults than a guest has vCPUs and I/O threads.
const MOST_PARKED: usize = 512;

/// A fault that waits for its next try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parked {
    /// The page that is waited for.
    pub page: PageIndex,
    /// When its event was read.
    pub since: Instant,
    /// How long it pauses after the next refusal.
    pause: Duration,
    due: Instant,
}

/// What became of a fault that asked to be parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It will come back from [`RetryList::take_due`].
    Parked,
    /// The list is full: wake its thread instead, so that it faults again.
    Bounce,
}

/// The parked faults of one session.
#[derive(Debug, Default)]
pub(crate) struct RetryList {
    parked: Vec<Parked>,
}

impl RetryList {
    /// Parks a fault that was refused for the first time.
    pub(crate) fn park(&mut self, page: PageIndex, since: Instant, now: Instant) -> Admission {
        self.insert(Parked {
            page,
            since,
            pause: FIRST_PAUSE,
            due: now + FIRST_PAUSE,
        })
    }

    /// Parks a fault that was refused again, for twice as long.
    pub(crate) fn park_again(&mut self, refused: Parked, now: Instant) -> Admission {
        let pause = (refused.pause * 2).min(LONGEST_PAUSE);
        self.insert(Parked {
            pause,
            due: now + pause,
            ..refused
        })
    }

    fn insert(&mut self, parked: Parked) -> Admission {
        if self.parked.iter().any(|other| other.page == parked.page) {
            return Admission::Parked;
        }
        if self.parked.len() == MOST_PARKED {
            return Admission::Bounce;
        }
        self.parked.push(parked);
        Admission::Parked
    }

    /// Takes one fault whose pause is over.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<Parked> {
        let at = self.parked.iter().position(|parked| parked.due <= now)?;
        Some(self.parked.swap_remove(at))
    }

    /// Whether no fault is parked.
    pub(crate) fn is_empty(&self) -> bool {
        self.parked.is_empty()
    }

    /// When the next fault is due.
    #[must_use]
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.parked.iter().map(|parked| parked.due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_fault_comes_back_after_growing_pauses() {
        let start = Instant::now();
        let mut list = RetryList::default();
        list.park(PageIndex::new(7), start, start);
        let mut now = start;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let due = list.next_due().unwrap();
            assert!(list.take_due(due - Duration::from_nanos(1)).is_none());
            let parked = list.take_due(due).unwrap();
            assert_eq!(parked.since, start);
            pauses.push((due - now).as_micros());
            now = due;
            list.park_again(parked, now);
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000, 2000]);
    }

    #[test]
    fn a_page_is_parked_once_and_a_full_list_bounces() {
        let now = Instant::now();
        let mut list = RetryList::default();
        for page in 0..MOST_PARKED as u64 {
            assert_eq!(list.park(PageIndex::new(page), now, now), Admission::Parked);
        }
        assert_eq!(list.park(PageIndex::new(3), now, now), Admission::Parked);
        assert_eq!(list.park(PageIndex::new(9999), now, now), Admission::Bounce);
    }
}
