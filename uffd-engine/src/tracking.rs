//! Which pages a guest has written, exactly, on an unmodified VMM: pages are installed
//! write-protected, and the first write to each is an event.
//!
//! ```text
//!   Missing ──fault──▶ Clean | Zero (protected) ──first write──▶ Dirty (unprotected)
//!   Removed ──fault──▶ Dirty: it differs from its parent as it is
//! ```
//!
//! Where the VMM opened its userfaultfd with `WP_ASYNC`, the kernel unprotects by itself and
//! remembers: there are no events then, and `PAGEMAP_SCAN` tells what is protected still.
//!
//! `Dirty` is recorded before a page is unprotected: an engine that dies between the two leaves
//! a page too many in the set, never one too few. For the same reason all that was installed
//! before tracking began counts as written.

use std::io;

use serde::{Deserialize, Serialize};
use snapshot_format::{PageCount, PageIndex};

use crate::fault_source::FaultSource;
use crate::page_state::PageState;
use crate::session::Session;

/// Who notices the first write to a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tracking {
    /// Nobody.
    #[default]
    Off,
    /// The engine: each is an event.
    Events,
    /// The kernel: the userfaultfd was opened with `WP_ASYNC`. Where it was not, writes come as
    /// events all the same.
    Kernel,
}

impl<S: FaultSource> Session<S> {
    /// Begins to track writes.
    ///
    /// # Errors
    /// The memory is of a kind that can't be tracked this way; the session goes on without.
    pub(crate) fn track_writes(&mut self, tracking: Tracking) -> io::Result<()> {
        if tracking == Tracking::Off {
            self.parts.tracking = tracking;
            return Ok(());
        }
        let page_bytes = self.parts.regions.page_bytes();
        for region in self.parts.regions.regions() {
            let bytes = region.pages.get() * page_bytes;
            self.parts.guest.watch_writes(region.base, bytes)?;
        }
        self.begin_tracking(tracking);
        Ok(())
    }

    pub(crate) fn tracks(&self) -> bool {
        self.parts.tracking != Tracking::Off
    }

    pub(crate) fn begin_tracking(&mut self, tracking: Tracking) {
        self.parts.tracking = tracking;
        let states = &self.parts.states;
        for page in (0..states.pages().get()).map(PageIndex::new) {
            if states.get(page).is_installed() {
                states.set(page, PageState::Dirty);
            }
        }
    }

    /// The guest writes to a protected page.
    pub(crate) fn let_write(&mut self, page: PageIndex) {
        // A page that was given back meanwhile stays that: its write will fault again.
        if self.parts.states.get(page).is_installed() {
            self.parts.states.set(page, PageState::Dirty);
        }
        let (addr, _) = self.parts.regions.addr_of(page);
        let page_bytes = self.parts.regions.page_bytes();
        if self.parts.guest.unprotect(addr, page_bytes).is_err() {
            // Not now (EAGAIN), or nobody is left: whoever waits writes again.
            self.wake(page);
        }
    }

    /// A page that was just installed for a write would fault once more.
    pub(crate) fn spare_second_fault(&mut self, page: PageIndex) {
        let state = self.parts.states.get(page);
        if matches!(state, PageState::Clean | PageState::Zero) {
            self.let_write(page);
        }
    }

    /// Records that pages were installed.
    pub(crate) fn note_states(&mut self, start: u64, end: u64, copied: bool) {
        let states = &self.parts.states;
        let (first, pages) = (PageIndex::new(start), PageCount::new(end - start));
        if copied {
            return states.set_run(first, pages, PageState::Clean);
        }
        if !self.tracks() {
            return states.set_run(first, pages, PageState::Zero);
        }
        for page in (start..end).map(PageIndex::new) {
            let state = match states.get(page) {
                PageState::Missing | PageState::Reading => PageState::Zero,
                // Zero in place of what it was.
                _ => PageState::Dirty,
            };
            states.set(page, state);
        }
    }

    /// What to call a page that the kernel says is there and the table says is not: its engine
    /// died before it could say so. The guest may have written it since, or it may be zero after
    /// it was given back.
    pub(crate) fn state_of_a_found_page(&self) -> PageState {
        if self.tracks() {
            PageState::Dirty
        } else {
            PageState::Clean
        }
    }
}
