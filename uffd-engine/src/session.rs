//! One sandbox's memory being served: events in, pages installed, states recorded.
//!
//! A session decides nothing about content ([`resolve`](crate::resolve) does) and
//! nothing about time or fairness (the worker does). It owns the userfaultfd, and
//! keeps the one invariant that matters: **no fault is forgotten**. Each ends in an
//! install, a wake, a parked retry, a read in flight, or a session that failed and
//! says why.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapshot_format::{Extent, PageCount, PageIndex};

use crate::background::Background;
use crate::counters::{Counters, SessionStats};
use crate::fault_source::{FaultSource, Guest, Settled};
use crate::page_state::{PageState, PageStates};
use crate::region::RegionTable;
use crate::resolve::{Resolution, resolve};
use crate::retry::{Parked, RetryList};
use crate::source::{Location, PageSource};
use crate::sys::mapping::{CACHE_PAGE, zeros};
use crate::sys::process::thread_major_faults;
use crate::sys::uffd::{Event, EventBuffer, FaultKind, SourceAddr};
use crate::tracking::Tracking;
use crate::window;

/// A read that a session wants: the worker finds a buffer for it or refuses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadRequest {
    pub(crate) first: PageIndex,
    pub(crate) pages: PageCount,
    /// Of all those pages.
    pub(crate) bytes: u64,
    pub(crate) at: Location,
    /// The page somebody waits for; none is read ahead.
    pub(crate) demand: Option<PageIndex>,
    /// When that fault was read.
    pub(crate) since: Instant,
}

/// What a session needs of its worker.
pub(crate) trait Reads {
    /// How many of `len` bytes at a location can be copied without waiting for the disk.
    fn resident(&mut self, source: &PageSource, at: Location, len: u64, now: Instant) -> u64;

    /// The most bytes of one read, for pages of this size.
    fn longest_read(&self, page_bytes: u64) -> u64;

    /// Starts a read. `false` means no buffer is free: try again later.
    fn start(&mut self, source: &PageSource, request: ReadRequest) -> bool;
}

/// One fault on its way to an answer.
#[derive(Clone, Copy)]
pub(crate) struct Demand {
    pub(crate) page: PageIndex,
    /// When its event was read.
    pub(crate) since: Instant,
    /// When this try began.
    pub(crate) now: Instant,
    /// Set when it has been parked before, so that its pause grows.
    pub(crate) parked: Option<Parked>,
}

/// What a session is made of; all of it checked.
pub(crate) struct SessionParts<S = Guest> {
    pub(crate) guest: S,
    pub(crate) pidfd: OwnedFd,
    /// Kept open: a VMM may watch its end to learn that its handler died.
    #[expect(dead_code, reason = "held for its lifetime, never read")]
    pub(crate) handoff: Option<OwnedFd>,
    pub(crate) regions: RegionTable,
    pub(crate) states: PageStates,
    pub(crate) source: Arc<PageSource>,
    /// Whether pages are installed write-protected. `Dirty` is exact with
    /// [`Tracking::Events`] only.
    pub(crate) tracking: Tracking,
}

impl<S: FaultSource> SessionParts<S> {
    /// Has every fault reported again that waits for an answer.
    pub(crate) fn wake_all(&self) {
        for region in self.regions.regions() {
            let bytes = region.pages.get() * self.regions.page_bytes();
            let _ = self.guest.wake(region.base, bytes);
        }
    }
}

/// One sandbox attached to a worker.
pub(crate) struct Session<S = Guest> {
    pub(crate) parts: SessionParts<S>,
    pub(crate) counters: Counters,
    pub(crate) background: Background,
    pub(crate) retries: RetryList,
    window_pages: u64,
    /// What a zero page is copied from where it can't be had otherwise.
    pub(crate) zeros: SourceAddr,
    /// Faults of the current turn that were answered in it.
    pub(crate) answered_at_once: u64,
    /// When it was last looked after.
    last_turn: Instant,
    failure: Option<String>,
}

impl<S: FaultSource> Session<S> {
    pub(crate) fn new(parts: SessionParts<S>, window_pages: u64) -> Self {
        // A huge page is a window by itself.
        let pages_of_4k = parts.regions.page_bytes() / CACHE_PAGE;
        Self {
            window_pages: (window_pages / pages_of_4k).max(1),
            zeros: zeros(),
            parts,
            counters: Counters::default(),
            background: Background::default(),
            retries: RetryList::default(),
            answered_at_once: 0,
            last_turn: Instant::now(),
            failure: None,
        }
    }

    pub(crate) fn guest(&self) -> &S {
        &self.parts.guest
    }

    pub(crate) fn source(&self) -> &PageSource {
        &self.parts.source
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.parts.pidfd.as_fd()
    }

    /// To be asked for on the worker's thread, whose own faults are in it.
    pub(crate) fn stats(&self) -> SessionStats {
        let mut counters = self.counters.clone();
        if let Some(replay) = &self.background.replay {
            counters.keep_replay(replay.tally());
        }
        if let Some(loader) = &self.background.loader {
            counters.pages_loaded += loader.pages;
        }
        counters.snapshot(
            self.parts.states.count_installed().get(),
            thread_major_faults(),
        )
    }

    /// When something is to be done without an event.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let all = [
            self.retries.next_due(),
            self.background.next_due(),
            self.parts.guest.due(),
        ];
        all.into_iter().flatten().min()
    }

    /// The reason of a failure that was not reported yet.
    pub(crate) fn take_failure(&mut self) -> Option<String> {
        self.failure.take()
    }

    /// Reads one batch of events and answers them; `true` when more may be waiting.
    pub(crate) fn turn(&mut self, events: &mut EventBuffer, reads: &mut impl Reads) -> bool {
        if let Err(error) = self.parts.guest.read_events(events) {
            self.fail(format!("Reading fault events failed: {error}"));
            return false;
        }
        let since = Instant::now();
        // A REMOVE may have been queued after the fault it caused: apply them all first.
        for event in events.iter() {
            self.note_removal(event);
        }
        for event in events.iter() {
            if let Event::Fault { addr, kind } = event {
                self.counters.faults += 1;
                match self.parts.regions.page_at(addr) {
                    Some(page) => self.answer(
                        Demand {
                            page,
                            since,
                            now: since,
                            parked: None,
                        },
                        kind,
                        reads,
                    ),
                    None => self.fail(format!("A fault at {addr} lies outside the guest's memory")),
                }
            }
        }
        self.counters.end_turn(since, &mut self.answered_at_once);
        self.last_turn = since;
        events.was_full()
    }

    /// Ends a step of any kind: tells the VMM what is done, where it has to be told.
    pub(crate) fn settle(&mut self) -> Settled {
        self.parts.guest.settle().unwrap_or_else(|error| {
            self.fail(format!("Answering page requests failed: {error}"));
            Settled::Over
        })
    }

    /// Goes on although everything that was under way for it is lost.
    pub(crate) fn start_over(&mut self) {
        self.parts.states.forget_reads();
        self.background.forget_reads(Instant::now());
        self.parts.wake_all();
    }

    /// When its events were read last.
    pub(crate) fn last_turn(&self) -> Instant {
        self.last_turn
    }

    /// Whether nothing is under way, and nothing has happened for so long.
    pub(crate) fn is_idle(&self, now: Instant, long: Duration) -> bool {
        self.retries.is_empty()
            && self.background.is_idle()
            && now.saturating_duration_since(self.last_turn) >= long
    }

    /// Tries parked faults whose pause is over. Events are read first: the REMOVE that
    /// blocks them may be among those.
    pub(crate) fn retry_due(&mut self, now: Instant, reads: &mut impl Reads) {
        while let Some(parked) = self.retries.take_due(now) {
            let demand = Demand {
                page: parked.page,
                since: parked.since,
                now,
                parked: Some(parked),
            };
            self.answer(demand, FaultKind::Read, reads);
        }
    }

    fn note_removal(&mut self, event: Event) {
        let (Event::Remove { start, end } | Event::Unmap { start, end }) = event else {
            return;
        };
        self.counters.removes += 1;
        for (first, pages) in self.parts.regions.pages_in(start, end) {
            self.parts.states.set_run(first, pages, PageState::Removed);
        }
    }

    fn answer(&mut self, demand: Demand, kind: FaultKind, reads: &mut impl Reads) {
        let state = self.parts.states.get(demand.page);
        if demand.parked.is_none() {
            self.background.note_fault(demand.page, state, demand.now);
        }
        let extent = self.parts.source.extent(demand.page);
        match resolve(kind, state, extent) {
            Resolution::Await => {}
            Resolution::Wake => self.wake(demand.page),
            Resolution::LetWrite => self.let_write(demand.page),
            Resolution::Zero if state == PageState::Missing => {
                let run = self.window(extent, demand);
                self.install(run.start, run.end, None, Some(demand));
            }
            Resolution::Zero => self.zero_again(demand, state),
            Resolution::Fill(extent) => self.fill(extent, demand, reads),
        }
        if self.parts.tracking == Tracking::Events && kind == FaultKind::Write {
            self.spare_second_fault(demand.page);
        }
    }

    fn window(&self, extent: Extent, demand: Demand) -> Range<u64> {
        let pages = if self.background.records(demand.now) {
            1
        } else {
            self.window_pages
        };
        window::around(demand.page, extent, &self.parts.states, pages)
    }

    /// Fills from the page cache as far as that goes, else starts a read.
    fn fill(&mut self, extent: Extent, demand: Demand, reads: &mut impl Reads) {
        let run = self.window(extent, demand);
        let page_bytes = self.parts.regions.page_bytes();
        let at = self.parts.source.locate(extent, PageIndex::new(run.start));
        let bytes = (run.end - run.start) * page_bytes;
        let resident = reads.resident(&self.parts.source, at, bytes, demand.now);
        let resident_end = run.start + resident / page_bytes;
        if demand.page.get() < resident_end {
            let source = self.parts.source.address(at, bytes);
            self.install(run.start, resident_end, Some(source), Some(demand));
            return;
        }
        // What lies before the resident end is not waited for; read from the demanded
        // page on, so that its data is one read and nothing is fetched twice.
        let first = demand.page;
        let pages = PageCount::new(run.end - first.get());
        let at = self.parts.source.locate(extent, first);
        let request = ReadRequest {
            first,
            pages,
            bytes: pages.get() * page_bytes,
            at,
            demand: Some(demand.page),
            since: demand.since,
        };
        if reads.start(&self.parts.source, request) {
            self.parts.states.set_run(first, pages, PageState::Reading);
        } else {
            self.park(demand);
        }
    }

    pub(crate) fn fail(&mut self, reason: String) {
        self.failure.get_or_insert(reason);
    }
}
