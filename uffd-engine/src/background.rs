//! What a session does while nobody waits for it: replay a working set, load all of its memory.
//!
//! One step installs at most one run of 256 KiB, and its worker takes one only when no session
//! has events to read. What is refused for now, or finds no read slot, is not insisted on.

use std::time::{Duration, Instant};

use snapshot_format::{Origin, PageCount, PageIndex, PageRun};

use crate::fault_source::FaultSource;
use crate::loader::{Load, Loader};
use crate::page_state::PageState;
use crate::recording::Recording;
use crate::replay::{MAX_RUN_BYTES, Replay};
use crate::session::{ReadRequest, Reads, Session};

/// How long to stay away after a refusal.
const PAUSE: Duration = Duration::from_micros(500);
/// How long nobody may have waited for a replay to go on by itself.
const IDLE: Duration = Duration::from_millis(1);
/// Reads in flight that nobody waits for, of one session.
const MAX_READS_AHEAD: u32 = 4;

/// One session's work ahead of its faults.
#[derive(Debug, Default)]
pub(crate) struct Background {
    pub(crate) recording: Option<Recording>,
    pub(crate) replay: Option<Replay>,
    pub(crate) loader: Option<Loader>,
    /// The replay waits for credit, or for time to pass.
    pub(crate) paused: bool,
    /// Nothing is to be done before this.
    pub(crate) due: Option<Instant>,
    /// Whether its worker has it in its queue.
    pub(crate) queued: bool,
    pub(crate) reads_ahead: u32,
    /// A load that has just ended, and how many pages it took.
    pub(crate) loaded: Option<u64>,
}

/// What one step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// There is more.
    More,
    /// Nothing before this.
    NotBefore(Instant),
    /// All is done.
    Over,
}

impl Background {
    /// A demand fault, before it is answered.
    pub(crate) fn note_fault(&mut self, page: PageIndex, state: PageState, now: Instant) {
        if let Some(recording) = &mut self.recording {
            recording.note(page, now);
        }
        if let Some(replay) = &mut self.replay {
            replay.note_fault(page, state);
            if self.paused && !replay.waits() {
                // Goes on at once, and no sooner than the fault is answered.
                self.paused = false;
                self.due = Some(now);
            }
        }
    }

    /// When something is to be done.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let recorded = self.recording.as_ref().and_then(Recording::until);
        match (self.due, recorded) {
            (Some(due), Some(recorded)) => Some(due.min(recorded)),
            (due, recorded) => due.or(recorded),
        }
    }

    /// Whether a replay goes on.
    pub(crate) fn replays(&self) -> bool {
        self.replay.as_ref().is_some_and(|replay| !replay.is_over())
    }

    /// Its reads are lost, and its place in the queue.
    pub(crate) fn forget_reads(&mut self, now: Instant) {
        self.reads_ahead = 0;
        self.queued = false;
        self.due = Some(now);
    }

    /// Whether there is nothing to do, now or later.
    pub(crate) fn is_idle(&self) -> bool {
        self.recording.is_none()
            && self.loader.is_none()
            && !self.replays()
            && !self.queued
            && self.reads_ahead == 0
            && self.due.is_none()
    }

    /// Whether neighbours are to be left alone, for their touches to be seen.
    pub(crate) fn records(&self, now: Instant) -> bool {
        self.recording
            .as_ref()
            .is_some_and(|recording| recording.goes_on(now))
    }
}

impl<S: FaultSource> Session<S> {
    /// Starts recording demand faults, in place of an earlier recording.
    pub(crate) fn record(&mut self, window: Duration, max_pages: usize) {
        self.background.recording = Some(Recording::new(window, max_pages));
    }

    /// Ends a recording and returns what was touched.
    pub(crate) fn take_recording(&mut self) -> Option<Recording> {
        self.background.recording.take()
    }

    /// A recording whose time is over.
    pub(crate) fn take_finished_recording(&mut self, now: Instant) -> Option<Recording> {
        let until = self.background.recording.as_ref()?.until()?;
        (until <= now).then(|| self.take_recording())?
    }

    /// Starts replaying.
    pub(crate) fn replay(&mut self, runs: Vec<PageRun>) {
        let pages = self.parts.states.pages().get();
        let page_bytes = self.parts.regions.page_bytes();
        self.background.replay = Some(Replay::new(runs, pages, page_bytes));
    }

    /// Starts loading all memory, or goes on at another rate.
    pub(crate) fn load(&mut self, bytes_per_second: u64, now: Instant) {
        self.background.loader = Some(Loader::new(bytes_per_second, now));
    }

    /// Ends replay and load; reads under way are installed when they complete.
    pub(crate) fn halt(&mut self) {
        self.background.loader = None;
        if let Some(replay) = &mut self.background.replay {
            self.counters.keep_replay(replay.tally());
        }
        self.background.replay = None;
    }

    /// One step of whatever there is to do.
    pub(crate) fn background_step(&mut self, reads: &mut impl Reads, now: Instant) -> Progress {
        self.background.due = None;
        let progress = self.step(reads, now);
        if let Progress::NotBefore(due) = progress {
            self.background.due = Some(due);
        }
        progress
    }

    fn step(&mut self, reads: &mut impl Reads, now: Instant) -> Progress {
        if self.background.reads_ahead >= MAX_READS_AHEAD {
            return Progress::NotBefore(now + PAUSE);
        }
        if let Some(progress) = self.step_replay(reads, now) {
            return progress;
        }
        let Some(loader) = &mut self.background.loader else {
            return Progress::Over;
        };
        match loader.next(&self.parts.source, &self.parts.states, now) {
            Load::Again => Progress::More,
            Load::Wait(due) => Progress::NotBefore(due),
            Load::Done => {
                self.counters.pages_loaded += loader.pages;
                self.background.loaded = Some(loader.pages);
                self.background.loader = None;
                Progress::Over
            }
            Load::Run(run) => {
                let reached = self.install_ahead(run.start, run.end, reads, now);
                let Some(loader) = &mut self.background.loader else {
                    return Progress::Over;
                };
                loader.pages += reached - run.start;
                if reached < run.end {
                    loader.put_back(reached, now);
                }
                if loader.due() > now {
                    Progress::NotBefore(loader.due())
                } else {
                    Progress::More
                }
            }
        }
    }

    /// Runs of 256 KiB together; `None` when there is nothing to replay.
    fn step_replay(&mut self, reads: &mut impl Reads, now: Instant) -> Option<Progress> {
        let mut left = MAX_RUN_BYTES / self.parts.regions.page_bytes();
        loop {
            let replay = self.background.replay.as_mut()?;
            if replay.waits() {
                return Some(if std::mem::replace(&mut self.background.paused, true) {
                    // Nobody has waited for anything since.
                    self.background.paused = false;
                    replay.give_credit();
                    Progress::More
                } else {
                    Progress::NotBefore(now + IDLE)
                });
            }
            self.background.paused = false;
            let run = replay.next_run(&self.parts.states)?;
            let reached = self.install_ahead(run.start, run.end, reads, now);
            let replay = self.background.replay.as_mut()?;
            replay.note_installed(reached - run.start);
            if reached < run.end {
                replay.put_back(reached..run.end);
                return Some(Progress::NotBefore(now + PAUSE));
            }
            left = left.saturating_sub(run.end - run.start);
            if left == 0 {
                return Some(Progress::More);
            }
        }
    }

    /// Installs pages that nobody waits for, or starts reading them, as far as they are missing
    /// still; returns the first page for which neither was possible now.
    fn install_ahead(&mut self, start: u64, end: u64, reads: &mut impl Reads, now: Instant) -> u64 {
        let page_bytes = self.parts.regions.page_bytes();
        let mut at = start;
        while at < end {
            let first = PageIndex::new(at);
            if self.parts.states.get(first) != PageState::Missing {
                at += 1;
                continue;
            }
            let extent = self.parts.source.extent(first);
            let missing =
                |page: &u64| self.parts.states.get(PageIndex::new(*page)) == PageState::Missing;
            let stop = at
                + (at..end.min(extent.end().get()))
                    .take_while(missing)
                    .count() as u64;
            if extent.origin == Origin::Zero {
                let reached = self.install(at, stop, None, None);
                if reached < stop {
                    return reached;
                }
                at = stop;
                continue;
            }
            let bytes = (stop - at) * page_bytes;
            let place = self.parts.source.locate(extent, first);
            let resident = reads.resident(&self.parts.source, place, bytes, now) / page_bytes;
            if resident > 0 {
                let source = self.parts.source.address(place, bytes);
                let reached = self.install(at, at + resident, Some(source), None);
                if reached < at + resident {
                    return reached;
                }
                at += resident;
                continue;
            }
            let most = (reads.longest_read(page_bytes) / page_bytes).max(1);
            let pages = PageCount::new(most.min(stop - at));
            let request = ReadRequest {
                first,
                pages,
                bytes: pages.get() * page_bytes,
                at: place,
                demand: None,
                since: now,
            };
            if self.background.reads_ahead >= MAX_READS_AHEAD
                || !reads.start(&self.parts.source, request)
            {
                return at;
            }
            self.background.reads_ahead += 1;
            let states = &self.parts.states;
            states.set_run(first, pages, PageState::Reading);
            at += pages.get();
        }
        end
    }
}
