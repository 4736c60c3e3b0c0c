//! Installing pages, and what becomes of those that can't be installed.
//!
//! ```text
//!   COPY, ZEROPAGE ─┬─ done ──────────────────▶ states, counters
//!                   ├─ already there ─────────▶ wake
//!                   ├─ not now ───────────────▶ park the demand, leave neighbours missing
//!                   ├─ source unreadable ─────▶ poison, and the session has failed
//!                   └─ VMM gone, not mapped ──▶ nobody waits, or wake
//! ```

use snapshot_format::PageIndex;
use std::time::Instant;

use crate::fault_source::FaultSource;
use crate::page_state::PageState;
use crate::retry::Admission;
use crate::session::{Demand, ReadRequest, Session};
use crate::sys::mapping::{CACHE_PAGE, HUGE_PAGE};
use crate::sys::uffd::{InstallError, Installed, SourceAddr};

impl<S: FaultSource> Session<S> {
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
                    self.parts.guest.copy(addr, source, bytes, self.tracks())
                }
                None if self.tracks()
                    || page_bytes > CACHE_PAGE && !self.parts.guest.zeroes_all_sizes() =>
                {
                    // ZEROPAGE knows no huge pages and protects none; the zeros are as long
                    // as one huge page.
                    let bytes = (pages * page_bytes).min(HUGE_PAGE);
                    self.parts
                        .guest
                        .copy(addr, self.zeros, bytes, self.tracks())
                }
                None => self.parts.guest.zero(addr, pages * page_bytes),
            };
            at = self.note_installed(at, done, source.is_some(), demand);
            match done.stopped {
                None => {}
                Some(InstallError::Retry) if done.bytes > 0 => {}
                Some(InstallError::AlreadyPresent) => {
                    let page = PageIndex::new(at);
                    if !self.parts.states.get(page).is_installed() {
                        let found = self.state_of_a_found_page();
                        self.parts.states.set(page, found);
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

    /// Installs zeros where something was, if it is there no more.
    ///
    /// Where writes are tracked, the table calls the page given back beforehand: were this engine to
    /// die between the zeros and the table, their page would pass for one with the build's content,
    /// and unwritten, and the guest would find that content there after its next pause.
    pub(crate) fn zero_again(&mut self, demand: Demand, state: PageState) {
        let (page, zeroed) = (demand.page, self.counters.pages_zeroed);
        let may_pass = self.tracks() && state.is_installed();
        if may_pass {
            self.parts.states.set(page, PageState::Removed);
        }
        self.install(page.get(), page.get() + 1, None, Some(demand));
        if may_pass && self.counters.pages_zeroed == zeroed {
            // There it is, or can't be had now.
            self.parts.states.set(page, state);
        }
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

    pub(crate) fn park(&mut self, demand: Demand) {
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
        let _ = self.parts.guest.wake(addr, self.parts.regions.page_bytes());
    }

    /// Pages that can't be had: an error for the guest now rather than a hang, and a
    /// failure for the daemon.
    fn give_up(&mut self, start: u64, end: u64, reason: String) {
        for page in start..end {
            let page = PageIndex::new(page);
            let (addr, _) = self.parts.regions.addr_of(page);
            let page_bytes = self.parts.regions.page_bytes();
            let done = self.parts.guest.poison(addr, page_bytes);
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
}
