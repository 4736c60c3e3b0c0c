//! The kernel's side of one userfaultfd, as far as a handler can tell.
//!
//! Source: `mm/userfaultfd.c`, `fs/userfaultfd.c`, `mm/madvise.c` (6.18). A `madvise` that gives
//! pages back queues its `REMOVE` and sleeps until that is read; from queueing until the thread
//! ran again, installs fail with EAGAIN; after that, and not together with it, the pages go.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::rc::Rc;

use super::PAGES;
use crate::address::HostAddr;
use crate::fault_source::FaultSource;
use crate::sys::mapping::zeros;
use crate::sys::uffd::{Event, EventBuffer, FaultKind, InstallError, Installed, SourceAddr};

pub(super) const PAGE: u64 = 4096;
pub(super) const BASE: u64 = 0x7000_0000_0000;

/// What a present page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The build's, of this page of the memory.
    Build(u64),
    Zero,
    /// What the guest wrote over either.
    Written,
}

/// A `madvise` under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct GivingBack {
    first: u64,
    end: u64,
    /// Its event was read, so that its thread may go on.
    read: bool,
    /// Its thread has run: installs work again, its pages are about to go.
    running: bool,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) present: BTreeMap<u64, Content>,
    /// Present pages whose next write is an event.
    protected: BTreeSet<u64>,
    /// Whether a page was ever given back, completely.
    pub(super) removed: Vec<bool>,
    /// Whether a page was given back that a dead engine had installed without saying so.
    either: Vec<bool>,
    /// Threads that wait for a page, and whether they would write; several may wait for one.
    pub(super) waiting: Vec<(u64, bool)>,
    queue: VecDeque<Event>,
    pub(super) giving_back: Vec<GivingBack>,
    /// EAGAINs still to be given, for any other reason there may be.
    pub(super) refusals: u32,
    /// The most pages that one install gets through.
    pub(super) short: Option<u64>,
    pub(super) dead: bool,
    pub(super) poisoned: Vec<u64>,
    /// The most events that the next read gets.
    pub(super) most_events: usize,
    /// The engine dies with its next install, after the pages are there.
    pub(super) deadly: bool,
    /// Where the build's content begins in our memory.
    source_base: u64,
}

/// Of all engines that serve its userfaultfd, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Kernel(pub(super) Rc<RefCell<State>>);

/// What unwinds from an engine that dies.
#[derive(Debug)]
pub(super) struct Death;

impl Kernel {
    pub(super) fn new(source_base: u64) -> Self {
        Self(Rc::new(RefCell::new(State {
            present: BTreeMap::new(),
            protected: BTreeSet::new(),
            removed: vec![false; PAGES as usize],
            either: vec![false; PAGES as usize],
            waiting: Vec::new(),
            queue: VecDeque::new(),
            giving_back: Vec::new(),
            refusals: 0,
            short: None,
            dead: false,
            poisoned: Vec::new(),
            most_events: usize::MAX,
            deadly: false,
            source_base,
        })))
    }
}

impl State {
    pub(super) fn touch(&mut self, page: u64, write: bool, seen: impl FnOnce(Content)) {
        if self.poisoned.contains(&page) {
            return;
        }
        match self.present.get_mut(&page) {
            Some(_) if write && self.protected.contains(&page) => {
                self.waiting.push((page, write));
                self.queue.push_back(Event::Fault {
                    addr: HostAddr::new(BASE + page * PAGE + 8),
                    kind: FaultKind::WriteProtect,
                });
            }
            Some(content) => {
                seen(*content);
                if write {
                    *content = Content::Written;
                }
            }
            None => {
                self.waiting.push((page, write));
                self.queue.push_back(Event::Fault {
                    addr: HostAddr::new(BASE + page * PAGE + 8),
                    kind: if write {
                        FaultKind::Write
                    } else {
                        FaultKind::Read
                    },
                });
            }
        }
    }

    pub(super) fn give_back(&mut self, first: u64, end: u64) {
        self.queue.push_back(Event::Remove {
            start: HostAddr::new(BASE + first * PAGE),
            end: HostAddr::new(BASE + end * PAGE),
        });
        self.giving_back.push(GivingBack {
            first,
            end,
            read: false,
            running: false,
        });
    }

    /// One step of a thread in `madvise`: it runs again, then its pages go.
    pub(super) fn step_giving_back(&mut self, which: usize) {
        let call = &mut self.giving_back[which];
        if !call.read {
            return;
        }
        if !call.running {
            call.running = true;
            return;
        }
        let call = self.giving_back.remove(which);
        for page in call.first..call.end {
            self.present.remove(&page);
            self.protected.remove(&page);
            self.removed[page as usize] = true;
        }
    }

    /// A hole in the file behind shared memory: its pages go at once, and nobody is told. One that
    /// the table calls installed is zero from now on; any other may have the build's content again.
    pub(super) fn punch(&mut self, first: u64, end: u64, is_installed: impl Fn(u64) -> bool) {
        for page in first..end {
            if self.present.remove(&page).is_some() {
                self.protected.remove(&page);
                let known = is_installed(page);
                self.removed[page as usize] |= known;
                self.either[page as usize] |= !known;
            }
        }
    }

    /// Lets all go on that wait: whatever they wait for is asked for again.
    pub(super) fn wake_all(&mut self) {
        self.wake_range(0, PAGES);
    }

    /// Whether both contents are right, as in the middle of being given back.
    pub(super) fn in_between(&self, page: u64) -> bool {
        let covers = |call: &GivingBack| (call.first..call.end).contains(&page);
        self.giving_back.iter().any(covers) || self.may_be_either(page)
    }

    /// Whether both contents stay right, after all calls.
    pub(super) fn may_be_either(&self, page: u64) -> bool {
        self.either[page as usize]
    }

    fn may_install(&mut self) -> Result<(), InstallError> {
        if self.dead {
            return Err(InstallError::GuestGone);
        }
        let changing = self.giving_back.iter().any(|call| !call.running);
        if changing {
            return Err(InstallError::Retry);
        }
        if self.refusals > 0 {
            self.refusals -= 1;
            return Err(InstallError::Retry);
        }
        Ok(())
    }

    fn install(
        &mut self,
        dst: HostAddr,
        len: u64,
        protect: bool,
        content: impl Fn(u64) -> Content,
    ) -> Installed {
        let installed = self.install_pages(dst, len, protect, content);
        if self.deadly && installed.bytes > 0 {
            self.deadly = false;
            std::panic::resume_unwind(Box::new(Death));
        }
        installed
    }

    fn install_pages(
        &mut self,
        dst: HostAddr,
        len: u64,
        protect: bool,
        content: impl Fn(u64) -> Content,
    ) -> Installed {
        let refused = |error| Installed {
            bytes: 0,
            stopped: Some(error),
        };
        if let Err(error) = self.may_install() {
            return refused(error);
        }
        let first = (dst.get() - BASE) / PAGE;
        let pages = len / PAGE;
        assert!(first + pages <= PAGES, "an install leaves the memory");
        let limit = self.short.unwrap_or(pages).min(pages);
        for done in 0..pages {
            let page = first + done;
            let blocked = self.present.contains_key(&page) || self.poisoned.contains(&page);
            if done == limit || blocked {
                let stopped = match (done, blocked) {
                    (0, true) => InstallError::AlreadyPresent,
                    _ => InstallError::Retry,
                };
                self.wake_range(first, first + done);
                return Installed {
                    bytes: done * PAGE,
                    stopped: Some(stopped),
                };
            }
            self.present.insert(page, content(done));
            if protect {
                self.protected.insert(page);
            }
        }
        self.wake_range(first, first + pages);
        Installed {
            bytes: len,
            stopped: None,
        }
    }

    /// Lets the threads go on that wait in a range: they touch again, which may fault again.
    fn wake_range(&mut self, first: u64, end: u64) {
        let (woken, still): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|(page, _)| (first..end).contains(page));
        self.waiting = still;
        for (page, write) in woken {
            let in_between = self.in_between(page);
            let removed = self.removed[page as usize];
            self.touch(page, write, |content| {
                check_content(page, content, removed, in_between);
            });
        }
    }
}

/// The one thing that a guest can see.
pub(super) fn check_content(page: u64, content: Content, removed: bool, in_between: bool) {
    let right = match content {
        Content::Written => true,
        Content::Build(of) => of == page && !is_zero(page) && (!removed || in_between),
        Content::Zero => is_zero(page) || removed || in_between,
    };
    assert!(
        right,
        "page {page} reads as {content:?}; given back: {removed}, being given back: {in_between}"
    );
}

/// Which pages of the build are zero: runs of three, so that extents end inside windows.
pub(super) fn is_zero(page: u64) -> bool {
    page % 8 >= 5
}

impl FaultSource for Kernel {
    fn read_events(&self, buffer: &mut EventBuffer) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        buffer.clear();
        let mut left = std::mem::replace(&mut state.most_events, usize::MAX);
        while left > 0
            && let Some(event) = state.queue.front()
            && buffer.push(*event)
        {
            if let Event::Remove { .. } = event
                && let Some(call) = state.giving_back.iter_mut().find(|call| !call.read)
            {
                call.read = true;
            }
            state.queue.pop_front();
            left -= 1;
        }
        Ok(())
    }

    fn copy(&self, dst: HostAddr, src: SourceAddr, len: u64, protect: bool) -> Installed {
        let state = &mut *self.0.borrow_mut();
        if src.get() == zeros().get() {
            return state.install(dst, len, protect, |_| Content::Zero);
        }
        let from = (src.get() - state.source_base) / PAGE;
        state.install(dst, len, protect, |done| Content::Build(from + done))
    }

    fn watch_writes(&self, _: HostAddr, _: u64) -> io::Result<()> {
        // Pages are protected as they are installed; there is nothing to register.
        Ok(())
    }

    fn unprotect(&self, start: HostAddr, len: u64) -> io::Result<()> {
        let state = &mut *self.0.borrow_mut();
        if let Err(error) = state.may_install() {
            let kind = match error {
                InstallError::Retry => io::ErrorKind::WouldBlock,
                _ => io::ErrorKind::NotFound,
            };
            return Err(kind.into());
        }
        let first = (start.get() - BASE) / PAGE;
        let end = first + len / PAGE;
        state.protected.retain(|page| !(first..end).contains(page));
        state.wake_range(first, end);
        Ok(())
    }

    fn zero(&self, dst: HostAddr, len: u64) -> Installed {
        self.0
            .borrow_mut()
            .install(dst, len, false, |_| Content::Zero)
    }

    fn poison(&self, dst: HostAddr, len: u64) -> Installed {
        let state = &mut *self.0.borrow_mut();
        let done = |stopped: Option<InstallError>| Installed {
            bytes: if stopped.is_none() { len } else { 0 },
            stopped,
        };
        if let Err(error) = state.may_install() {
            return done(Some(error));
        }
        let page = (dst.get() - BASE) / PAGE;
        if state.present.contains_key(&page) {
            return done(Some(InstallError::AlreadyPresent));
        }
        state.poisoned.push(page);
        // Whoever waits gets a signal.
        state.waiting.retain(|(waiting, _)| *waiting != page);
        done(None)
    }

    fn wake(&self, start: HostAddr, len: u64) -> io::Result<()> {
        let first = (start.get() - BASE) / PAGE;
        self.0.borrow_mut().wake_range(first, first + len / PAGE);
        Ok(())
    }
}
