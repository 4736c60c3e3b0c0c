//! What a worker does for one session at a time: a turn of its events, a step of its background
//! work, the end of one of its reads.
//!
//! A worker that spins asks the hot session again instead of waiting, and yields the core in
//! between. The hot session is the only one whose descriptor isn't polled:
//!
//! ```text
//!   polled ──readable──▶ turn ──events──▶ hot ──another is, or nothing for too long──▶ polled
//!     ▲                    │
//!     └────── none ────────┘
//! ```

use std::io;
use std::time::{Duration, Instant};

use super::{Waiting, Worker, command};
use crate::background::Progress;
use crate::control::Report;
use crate::fault_source::Settled;
use crate::outbox::Outbox;
use crate::read_jobs::{Job, PageReads};
use crate::roster::{Entry, Phase};
use crate::sys::ring::Completion;

/// How long a worker may spin on one session before it looks after everything else.
const LONGEST_SPIN: Duration = Duration::from_micros(200);

/// The session that is worth asking again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hot {
    index: u32,
    stamp: u32,
    /// When it had an event last.
    since: Instant,
}

impl Worker {
    /// One bounded turn of one session.
    pub(super) fn take_turn(&mut self, index: u32) -> io::Result<()> {
        let Some(entry) = self.roster.at(index) else {
            return Ok(());
        };
        let Phase::Serving(session) = &mut entry.phase else {
            return Ok(());
        };
        let stamp = entry.stamp;
        let mut reader = self.reads.reader(index, stamp);
        let more = session.turn(&mut self.events, &mut reader);
        let (due, since) = (session.next_due(), session.last_turn());
        entry.ready = settle(entry, &self.outbox) || more;
        if entry.ready {
            self.ready.push_back(index);
        }
        self.note_due(due);
        if self.options.waiting == Waiting::Block {
            return Ok(());
        }
        if !self.events.is_empty() {
            self.heat(Hot {
                index,
                stamp,
                since,
            })
        } else if self
            .hot
            .is_none_or(|hot| (hot.index, hot.stamp) != (index, stamp))
        {
            self.arm(index)
        } else {
            Ok(())
        }
    }

    /// Spins on this session from now on, and on no other.
    fn heat(&mut self, hot: Hot) -> io::Result<()> {
        match self.hot.replace(hot) {
            Some(other) if other.index != hot.index => self.arm(other.index),
            _ => Ok(()),
        }
    }

    /// Serves the hot session without waiting, for as long as it goes on faulting; everybody
    /// else is looked after at least every [`LONGEST_SPIN`].
    pub(super) fn spin(&mut self, patience: Duration) -> io::Result<()> {
        let begun = Instant::now();
        while let Some(hot) = self.hot {
            if self.roster.get(hot.index, hot.stamp).is_none() {
                self.hot = None;
                break;
            }
            if !self.ready.is_empty() {
                break;
            }
            self.take_turn(hot.index)?;
            let now = Instant::now();
            let since = self.hot.map_or(now, |hot| hot.since);
            if now.saturating_duration_since(since) >= patience {
                self.hot = None;
                return self.arm(hot.index);
            }
            if now - begun >= LONGEST_SPIN {
                break;
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// After a step that was no turn.
    fn settle(&mut self, index: u32) {
        if let Some(entry) = self.roster.at(index)
            && settle(entry, &self.outbox)
            && !std::mem::replace(&mut entry.ready, true)
        {
            self.ready.push_back(index);
        }
    }

    /// What is due of a session by now, except its events.
    pub(super) fn retry(&mut self, index: u32, now: Instant) {
        let Some(entry) = self.roster.at(index) else {
            return;
        };
        let Phase::Serving(session) = &mut entry.phase else {
            return;
        };
        session.retry_due(now, &mut self.reads.reader(index, entry.stamp));
        if let Some(recording) = session.take_finished_recording(now) {
            command::send_recording(&self.outbox, &entry.name, &recording);
        }
        let background = session.background.due.is_some_and(|due| due <= now);
        if background {
            session.background.due = None;
        }
        let due = session.next_due();
        self.note_due(due);
        if background {
            self.queue_background(index);
        }
        self.settle(index);
    }

    /// Queues a session for work that nobody waits for.
    pub(super) fn queue_background(&mut self, index: u32) {
        if let Some(entry) = self.roster.at(index)
            && let Phase::Serving(session) = &mut entry.phase
            && !std::mem::replace(&mut session.background.queued, true)
        {
            self.background.push_back(index);
        }
    }

    /// One step of one session.
    pub(super) fn step_background(&mut self) {
        let Some(index) = self.background.pop_front() else {
            return;
        };
        let Some(entry) = self.roster.at(index) else {
            return;
        };
        let Phase::Serving(session) = &mut entry.phase else {
            return;
        };
        session.background.queued = false;
        let mut reader = self.reads.reader(index, entry.stamp);
        let progress = session.background_step(&mut reader, Instant::now());
        if let Some(pages) = session.background.loaded.take() {
            let session = entry.name.clone();
            self.outbox.send(&Report::Loaded { session, pages }, &[]);
        }
        match progress {
            Progress::More => self.queue_background(index),
            Progress::NotBefore(due) => self.note_due(Some(due)),
            Progress::Over => {}
        }
        self.settle(index);
    }

    pub(super) fn read_done(&mut self, completion: Completion) {
        let PageReads { ring, jobs, .. } = &mut self.reads;
        let Some(job) = jobs.finish(completion.token) else {
            return;
        };
        let slot = completion.token.index as usize;
        let outcome = outcome_of(&job, completion.result).map(|()| ring.slot_source(slot));
        if let Some(entry) = self.roster.get(job.index, job.stamp)
            && let Phase::Serving(session) = &mut entry.phase
        {
            session.read_done(job.request, outcome, Instant::now());
            let due = session.next_due();
            self.note_due(due);
            self.settle(job.index);
        }
        self.reads.jobs.release(slot);
    }
}

/// Ends a step of a session: its VMM is told what is done, the daemon what it has to know.
/// `true` when there are events that no descriptor will announce.
fn settle(entry: &mut Entry, outbox: &Outbox) -> bool {
    let Phase::Serving(session) = &mut entry.phase else {
        return false;
    };
    let settled = session.settle();
    if let Some(reason) = session.take_failure() {
        let session = entry.name.clone();
        outbox.send(&Report::Failed { session, reason }, &[]);
    }
    if settled == Settled::Over && !std::mem::replace(&mut entry.over, true) {
        let session = entry.name.clone();
        outbox.send(&Report::Ended { session }, &[]);
    }
    settled == Settled::MoreEvents
}

/// What a finished read means; a short one is a file that was cut.
fn outcome_of(job: &Job, result: i32) -> Result<(), String> {
    let page = job.request.first.get();
    let expected = job.request.bytes;
    if result < 0 {
        let error = io::Error::from_raw_os_error(-result);
        return Err(format!("Reading page {page:#x} of its build: {error}"));
    }
    if (result as u64) < expected {
        return Err(format!(
            "Page {page:#x} of its build is cut: expected {expected} bytes, found {result}"
        ));
    }
    Ok(())
}
