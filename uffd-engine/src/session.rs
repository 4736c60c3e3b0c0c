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
use std::time::Instant;

use snapshot_format::{Extent, PageCount, PageIndex};

use crate::background::Background;
use crate::counters::{Counters, SessionStats};
use crate::fault_source::FaultSource;
use crate::page_state::{PageState, PageStates};
use crate::region::RegionTable;
use crate::resolve::{Resolution, resolve};
use crate::retry::{Admission, Parked, RetryList};
use crate::source::{Location, PageSource};
use crate::sys::mapping::{CACHE_PAGE, HUGE_PAGE, zeros};
use crate::sys::process::thread_major_faults;
use crate::sys::uffd::{Event, EventBuffer, FaultKind, InstallError, Installed, SourceAddr, Uffd};
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
    page: PageIndex,
    /// When its event was read.
    since: Instant,
    /// When this try began.
    now: Instant,
    /// Set when it has been parked before, so that its pause grows.
    parked: Option<Parked>,
}

/// What a session is made of; all of it checked.
pub(crate) struct SessionParts<S = Uffd> {
    pub(crate) uffd: S,
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

/// One sandbox attached to a worker.
pub(crate) struct Session<S = Uffd> {
    pub(crate) parts: SessionParts<S>,
    pub(crate) counters: Counters,
    pub(crate) background: Background,
    retries: RetryList,
    window_pages: u64,
    /// What a zero page is copied from where it can't be had otherwise.
    zeros: SourceAddr,
    /// Faults of the current turn that were answered in it.
    answered_at_once: u64,
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
            failure: None,
        }
    }

    pub(crate) fn uffd(&self) -> &S {
        &self.parts.uffd
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
        match (self.retries.next_due(), self.background.next_due()) {
            (Some(retry), Some(due)) => Some(retry.min(due)),
            (retry, due) => retry.or(due),
        }
    }

    /// The reason of a failure that was not reported yet.
    pub(crate) fn take_failure(&mut self) -> Option<String> {
        self.failure.take()
    }

    /// Reads one batch of events and answers them; `true` when more may be waiting.
    pub(crate) fn turn(&mut self, events: &mut EventBuffer, reads: &mut impl Reads) -> bool {
        if let Err(error) = self.parts.uffd.read_events(events) {
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
        events.was_full()
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
            Resolution::Zero => {
                let page = demand.page.get();
                self.install(page, page + 1, None, Some(demand));
            }
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

    /// A read has ended: installs what is still wanted of it.
    pub(crate) fn read_done(
        &mut self,
        request: ReadRequest,
        outcome: Result<SourceAddr, String>,
        now: Instant,
    ) {
        let first = request.first.get();
        let end = first + request.pages.get();
        let demand = request.demand.map(|page| Demand {
            page,
            since: request.since,
            now,
            parked: None,
        });
        if demand.is_none() {
            self.background.reads_ahead -= 1;
            // There is room for another.
            self.background.due = Some(now);
        }
        let source = match outcome {
            Ok(source) => source,
            Err(reason) if demand.is_some() => return self.give_up(first, end, reason),
            Err(reason) => return self.give_up_reading_ahead(first, end, &reason),
        };
        let page_bytes = self.parts.regions.page_bytes();
        let mut at = first;
        while at < end {
            if self.parts.states.get(PageIndex::new(at)) != PageState::Reading {
                // Removed while it was read: whoever waits must ask again and get zeros.
                self.wake(PageIndex::new(at));
                at += 1;
                continue;
            }
            let reading =
                |page: &u64| self.parts.states.get(PageIndex::new(*page)) == PageState::Reading;
            let run_end = (at..end).take_while(reading).last().unwrap_or(at) + 1;
            self.counters.pages_read += run_end - at;
            self.install(
                at,
                run_end,
                Some(source.offset((at - first) * page_bytes)),
                demand,
            );
            // What the kernel refused for now was parked or is a neighbour nobody waits for.
            for page in at..run_end {
                let page = PageIndex::new(page);
                if self.parts.states.get(page) == PageState::Reading {
                    self.parts.states.set(page, PageState::Missing);
                    self.wake(page);
                }
            }
            at = run_end;
        }
    }

    /// Installs pages `start..end` from `source` (or zeros) and answers `demand` if its
    /// page is among them. Returns the first page that could not be had now.
    pub(crate) fn install(
        &mut self,
        start: u64,
        end: u64,
        source: Option<SourceAddr>,
        demand: Option<Demand>,
    ) -> u64 {
        let page_bytes = self.parts.regions.page_bytes();
        let mut at = start;
        while at < end {
            let (addr, left) = self.parts.regions.addr_of(PageIndex::new(at));
            let pages = left.get().min(end - at);
            let done = match source {
                Some(source) => {
                    let source = source.offset((at - start) * page_bytes);
                    let bytes = pages * page_bytes;
                    self.parts.uffd.copy(addr, source, bytes, self.tracks())
                }
                None if page_bytes > CACHE_PAGE || self.tracks() => {
                    // ZEROPAGE knows no huge pages and protects none; the zeros are as long
                    // as one huge page.
                    let bytes = (pages * page_bytes).min(HUGE_PAGE);
                    self.parts.uffd.copy(addr, self.zeros, bytes, self.tracks())
                }
                None => self.parts.uffd.zero(addr, pages * page_bytes),
            };
            at = self.note_installed(at, done, source.is_some(), demand);
            match done.stopped {
                None => {}
                Some(InstallError::Retry) if done.bytes > 0 => {}
                Some(InstallError::AlreadyPresent) => {
                    let page = PageIndex::new(at);
                    let state = self.parts.states.get(page);
                    if !state.is_installed() {
                        self.parts
                            .states
                            .set(page, self.state_of_a_found_page(state));
                    }
                    self.counters.already_present += 1;
                    self.wake(page);
                    at += 1;
                }
                Some(InstallError::Retry | InstallError::OutOfMemory) => {
                    if let Some(demand) = demand
                        && (at..end).contains(&demand.page.get())
                    {
                        self.park(demand);
                    }
                    return at;
                }
                // The pidfd reports the VMM's end; nobody is left to wait.
                Some(InstallError::GuestGone) => return at,
                Some(InstallError::NotMapped) => {
                    self.wake(PageIndex::new(at));
                    at += 1;
                }
                Some(InstallError::SourceUnreadable) => {
                    let reason = format!("Page {at:#x} can't be read from its build");
                    self.give_up(at, at + 1, reason);
                    return at;
                }
                Some(InstallError::Errno(errno)) => {
                    let error = std::io::Error::from_raw_os_error(errno);
                    self.give_up(at, at + 1, format!("Installing page {at:#x}: {error}"));
                    return at;
                }
            }
        }
        end
    }

    /// Records what an install achieved; returns the first page it did not reach.
    fn note_installed(
        &mut self,
        start: u64,
        done: Installed,
        copied: bool,
        demand: Option<Demand>,
    ) -> u64 {
        let pages = done.bytes / self.parts.regions.page_bytes();
        let end = start + pages;
        self.note_states(start, end, copied);
        if copied {
            self.counters.pages_copied += pages;
        } else {
            self.counters.pages_zeroed += pages;
        }
        if let Some(demand) = demand
            && (start..end).contains(&demand.page.get())
        {
            if demand.since == demand.now {
                // Answered in the turn that read it: the turn's end looks at the clock.
                self.answered_at_once += 1;
            } else {
                self.counters.record_services(demand.since.elapsed(), 1);
            }
        }
        end
    }

    fn park(&mut self, demand: Demand) {
        self.counters.retries += 1;
        let now = Instant::now();
        let admission = match demand.parked {
            Some(parked) => self.retries.park_again(parked, now),
            None => self.retries.park(demand.page, demand.since, now),
        };
        if admission == Admission::Bounce {
            self.wake(demand.page);
        }
    }

    pub(crate) fn wake(&self, page: PageIndex) {
        let (addr, _) = self.parts.regions.addr_of(page);
        // It fails only when the VMM is gone, which its pidfd reports.
        let _ = self.parts.uffd.wake(addr, self.parts.regions.page_bytes());
    }

    /// Pages that can't be had: an error for the guest now rather than a hang, and a
    /// failure for the daemon.
    fn give_up(&mut self, start: u64, end: u64, reason: String) {
        for page in start..end {
            let page = PageIndex::new(page);
            let (addr, _) = self.parts.regions.addr_of(page);
            let page_bytes = self.parts.regions.page_bytes();
            let done = self.parts.uffd.poison(addr, page_bytes);
            if self.parts.states.get(page) == PageState::Reading {
                self.parts.states.set(page, PageState::Missing);
            }
            match done.stopped {
                None => self.counters.poisoned += 1,
                // Not now, or not necessary: whoever waits asks again.
                Some(_) => self.wake(page),
            }
        }
        self.fail(reason);
    }

    /// Pages that nobody had asked for can't be read: whoever does, will be told.
    fn give_up_reading_ahead(&mut self, start: u64, end: u64, reason: &str) {
        tracing::warn!(reason, "Reading ahead ends here");
        self.halt();
        for page in (start..end).map(PageIndex::new) {
            if self.parts.states.get(page) == PageState::Reading {
                self.parts.states.set(page, PageState::Missing);
            }
            self.wake(page);
        }
    }

    fn fail(&mut self, reason: String) {
        self.failure.get_or_insert(reason);
    }
}
