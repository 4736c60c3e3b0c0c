//! One sequence of steps: a session, the model, and the reads between them.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapshot_format::{PageCount, PageIndex, PageSize};

use super::PAGES;
use super::kernel::{BASE, Content, Death, Kernel, PAGE, check_content, is_zero};
use crate::page_state::{PageState, PageStates};
use crate::region::{ClaimedRegion, RegionTable};
use crate::session::{ReadRequest, Reads, Session, SessionParts};
use crate::source::{Location, PageSource};
use crate::sys::uffd::EventBuffer;
use crate::tracking::Tracking;

/// What may happen next.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// A thread of the guest.
    Touch { page: u64, write: bool },
    /// The VMM calls `madvise`.
    GiveBack { page: u64, pages: u64 },
    /// The VMM punches a hole.
    Punch { page: u64, pages: u64 },
    /// The engine dies at its next install, and has a successor.
    Die,
    /// One such call gets a step further.
    FinishGivingBack { which: u16 },
    /// The session reads this many events.
    Turn { most: usize },
    /// Time passes until the next retry.
    RetryDue,
    /// A read completes, or fails.
    FinishRead { which: u16, fail: bool },
    /// The kernel refuses this many installs.
    Refuse { times: u32 },
    /// Installs stop after so many pages.
    ShortCopies { pages: u64 },
    /// What is asked for is in the page cache, or isn't.
    PageCache { resident: bool },
    /// The worker has read slots, or none.
    Slots { free: bool },
}

/// The worker's part.
struct Backing {
    resident: bool,
    slots: bool,
    reads: VecDeque<ReadRequest>,
}

impl Reads for Backing {
    fn resident(&mut self, _: &PageSource, _: Location, len: u64, _: Instant) -> u64 {
        if self.resident { len } else { 0 }
    }

    fn longest_read(&self, _: u64) -> u64 {
        4 * PAGE
    }

    fn start(&mut self, _: &PageSource, request: ReadRequest) -> bool {
        if self.slots {
            self.reads.push_back(request);
        }
        self.slots
    }
}

/// What a session of this kernel's is made of.
fn parts(
    guest: Kernel,
    states: &PageStates,
    source: &Arc<PageSource>,
    pidfd: OwnedFd,
) -> SessionParts<Kernel> {
    let claim = ClaimedRegion {
        base: BASE,
        size: PAGES * PAGE,
        offset: 0,
        page_size: PAGE,
    };
    let memory = PageCount::new(PAGES);
    SessionParts {
        guest,
        pidfd,
        handoff: None,
        regions: RegionTable::new(&[claim], PAGE, memory).unwrap(),
        states: states.share().unwrap(),
        source: source.clone(),
        tracking: Tracking::Off,
    }
}

pub(super) struct Run {
    session: Session<Kernel>,
    source: Arc<PageSource>,
    states: PageStates,
    backing: Backing,
    events: EventBuffer,
    now: Instant,
    failed_reads: bool,
    tracks: bool,
    died: bool,
    window: u64,
    file: tempfile::NamedTempFile,
}

impl Run {
    pub(super) fn new(window: u64) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(PAGES * PAGE).unwrap();
        for page in (0..PAGES).filter(|page| !is_zero(*page)) {
            file.as_file()
                .write_all_at(&[1; 4096], page * PAGE)
                .unwrap();
        }
        file.flush().unwrap();
        let source = PageSource::open_plain(file.path(), PageSize::Size4K).unwrap();
        let start = Location { file: 0, offset: 0 };
        let base = source.address(start, PAGES * PAGE).get();
        let memory = PageCount::new(PAGES);
        let states = PageStates::create(memory).unwrap();
        // Any descriptor: only a worker looks at it.
        let pidfd = file.as_file().try_clone().unwrap().into();
        let parts = parts(Kernel::new(base), &states, &source, pidfd);
        Self {
            session: Session::new(parts, window),
            source,
            states,
            backing: Backing {
                resident: true,
                slots: true,
                reads: VecDeque::new(),
            },
            events: EventBuffer::default(),
            now: Instant::now(),
            failed_reads: false,
            tracks: false,
            died: false,
            window,
            file,
        }
    }

    /// The same with writes tracked.
    pub(super) fn tracking(window: u64) -> Self {
        let mut run = Self::new(window);
        run.session.begin_tracking(Tracking::Events);
        run.tracks = true;
        run
    }

    pub(super) fn step(&mut self, step: Step) {
        let done = std::panic::catch_unwind(AssertUnwindSafe(|| self.try_step(step)));
        if let Err(payload) = done {
            match payload.downcast::<Death>() {
                Ok(_) => self.succeed(),
                Err(payload) => std::panic::resume_unwind(payload),
            }
        }
    }

    /// Another engine takes over: it has the table and the userfaultfd, and no read, no parked
    /// fault, and no event that was read.
    fn succeed(&mut self) {
        self.died = true;
        // Nobody heard of what failed.
        self.failed_reads = false;
        let kernel = self.session.guest().clone();
        self.states.forget_reads();
        self.backing.reads.clear();
        let pidfd = self.file.as_file().try_clone().unwrap().into();
        let parts = parts(kernel, &self.states, &self.source, pidfd);
        self.session = Session::new(parts, self.window);
        if self.tracks {
            self.session.parts.tracking = Tracking::Events;
        }
        self.events = EventBuffer::default();
        self.session.guest().0.borrow_mut().wake_all();
    }

    fn try_step(&mut self, step: Step) {
        let kernel = &self.session.guest().0;
        match step {
            Step::Touch { page, write } => {
                let state = &mut *kernel.borrow_mut();
                let (removed, between) = (state.removed[page as usize], state.in_between(page));
                state.touch(page, write, |content| {
                    check_content(page, content, removed, between);
                });
            }
            Step::GiveBack { page, pages } => {
                let end = (page + pages).min(PAGES);
                kernel.borrow_mut().give_back(page, end);
            }
            Step::Punch { page, pages } => {
                let end = (page + pages).min(PAGES);
                let states = &self.states;
                let is_installed = |page| states.get(PageIndex::new(page)).is_installed();
                kernel.borrow_mut().punch(page, end, is_installed);
            }
            Step::Die => kernel.borrow_mut().deadly = true,
            Step::FinishGivingBack { which } => {
                let calls = kernel.borrow().giving_back.len();
                if calls > 0 {
                    kernel
                        .borrow_mut()
                        .step_giving_back(usize::from(which) % calls);
                }
            }
            Step::Turn { most } => {
                kernel.borrow_mut().most_events = most;
                self.session.turn(&mut self.events, &mut self.backing);
            }
            Step::RetryDue => self.retry(),
            Step::FinishRead { which, fail } => {
                if !self.backing.reads.is_empty() {
                    let which = usize::from(which) % self.backing.reads.len();
                    self.finish_read(which, fail);
                }
            }
            Step::Refuse { times } => kernel.borrow_mut().refusals += times,
            Step::ShortCopies { pages } => kernel.borrow_mut().short = Some(pages),
            Step::PageCache { resident } => self.backing.resident = resident,
            Step::Slots { free } => self.backing.slots = free,
        }
    }

    pub(super) fn kill_vmm(&mut self) {
        self.session.guest().0.borrow_mut().dead = true;
    }

    pub(super) fn forget_what_was_given_back(&mut self) {
        let all = PageCount::new(PAGES);
        self.states
            .set_run(PageIndex::new(0), all, PageState::Missing);
    }

    fn retry(&mut self) {
        if let Some(due) = self.session.next_due() {
            self.now = self.now.max(due) + Duration::from_nanos(1);
            self.session.retry_due(self.now, &mut self.backing);
        }
    }

    fn finish_read(&mut self, which: usize, fail: bool) {
        let request = self.backing.reads.remove(which).unwrap();
        let outcome = if fail {
            self.failed_reads = true;
            Err("the disk is gone".to_owned())
        } else {
            let bytes = request.pages.get() * PAGE;
            Ok(self.source.address(request.at, bytes))
        };
        self.session.read_done(request, outcome, self.now);
    }

    /// Lets everything that waits for something have it, in rounds, until nothing moves.
    pub(super) fn settle(&mut self) {
        {
            let state = &mut *self.session.guest().0.borrow_mut();
            state.refusals = 0;
            state.short = None;
            state.deadly = false;
        }
        self.backing.slots = true;
        for _ in 0..200 {
            self.session.turn(&mut self.events, &mut self.backing);
            let calls = self.session.guest().0.borrow().giving_back.len();
            for call in (0..calls).rev() {
                self.session.guest().0.borrow_mut().step_giving_back(call);
            }
            while !self.backing.reads.is_empty() {
                self.finish_read(0, false);
            }
            self.retry();
        }
    }

    /// Once the VMM is gone, nobody waits and nothing may fail.
    pub(super) fn settle_dead(&mut self) {
        self.session.turn(&mut self.events, &mut self.backing);
        while !self.backing.reads.is_empty() {
            self.finish_read(0, false);
        }
        self.retry();
        let failure = self.session.take_failure();
        assert!(failure.is_none() || self.failed_reads, "{failure:?}");
    }

    pub(super) fn check(&mut self) {
        let failure = self.session.take_failure();
        assert_eq!(failure.is_some(), self.failed_reads, "{failure:?}");
        let state = self.session.guest().0.borrow();
        assert!(
            state.waiting.is_empty(),
            "threads wait for ever: {:?}",
            state.waiting
        );
        assert!(self.session.next_due().is_none(), "a retry is left");
        for page in 0..PAGES {
            let known = self.states.get(PageIndex::new(page));
            let removed = state.removed[page as usize];
            assert_ne!(known, PageState::Reading, "page {page}");
            if let Some(content) = state.present.get(&page) {
                check_content(page, *content, removed, state.may_be_either(page));
                let differs = match content {
                    Content::Written => true,
                    Content::Zero => !is_zero(page),
                    Content::Build(_) => false,
                };
                let is_unwritten = matches!(known, PageState::Clean | PageState::Zero);
                assert!(
                    !self.tracks || !differs || !is_unwritten,
                    "page {page} is {content:?} and {known:?}"
                );
                assert!(
                    self.died || known.is_installed(),
                    "page {page} is there and {known:?}"
                );
            } else if removed {
                assert_ne!(known, PageState::Missing, "page {page} was given back");
            }
        }
    }
}
