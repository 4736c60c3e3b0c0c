//! One pinned thread that serves its sessions: one ring, one wait, bounded turns.
//!
//! ```text
//!   wait ─▶ completions ─▶ one turn per ready session (≤ 64 events) ─▶ what is due ─┐
//!    ▲                                                                             │
//!    └──────────── (no wait while a session is still ready) ◀──────────────────────┘
//! ```
//!
//! Nothing is shared with other workers. Commands come through a channel whose eventfd is
//! polled like everything else. A storm in one sandbox costs the others one turn of 64
//! events at a time, and what a turn costs doesn't grow with the number of idle sessions.

mod command;
mod handoff;

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use nix::sys::eventfd::EventFd;

use crate::background::Progress;
use crate::control::Report;
use crate::expecting::ExpectError;
use crate::outbox::Outbox;
use crate::read_jobs::{Job, ReadJobs, Reader};
use crate::residency::Residency;
use crate::roster::{Entry, Phase, Roster};
use crate::session::Session;
use crate::sys::mapping::ReadBuffers;
use crate::sys::ring::{Completion, Ring, Token};
use crate::sys::uffd::EventBuffer;

pub(crate) use command::{AheadOrder, Command};

/// Reads of huge pages in flight at most; their buffers exist once one is served.
const HUGE_READ_SLOTS: usize = 8;

/// How long a worker may spin on one session before it looks after everything else.
const LONGEST_SPIN: Duration = Duration::from_micros(200);

mod kind {
    pub(super) const MAILBOX: u8 = 1;
    pub(super) const LISTENER: u8 = 2;
    pub(super) const CONNECTION: u8 = 3;
    pub(super) const UFFD: u8 = 4;
    pub(super) const VMM: u8 = 5;
    pub(super) const READ: u8 = 6;
    /// The end of a poll of the kind in the other bits.
    pub(super) const CANCELLED: u8 = 0x80;
}

/// How a worker is set up.
#[derive(Clone, Copy, Debug)]
pub struct WorkerOptions {
    /// Reads in flight at most.
    pub read_slots: usize,
    /// How a worker waits.
    pub waiting: Waiting,
    /// The most pages installed around a fault whose content is at hand; a power of two.
    pub window_pages: u64,
}

/// How a worker waits for the next fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Waiting {
    /// In the kernel, for anything: nothing is spent on waiting.
    #[default]
    Block,
    /// After a fault, asks its session again for this long, and yields the core in between.
    /// Saves a system call and a wake-up per fault, and costs up to this much CPU after each.
    Spin {
        /// Microseconds; [`Waiting::Block`] is better than 0.
        us: u64,
    },
}

impl Waiting {
    /// Spins for so many microseconds; not at all for 0.
    #[must_use]
    pub const fn spinning(us: u64) -> Self {
        match us {
            0 => Self::Block,
            us => Self::Spin { us },
        }
    }
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            read_slots: 64,
            waiting: Waiting::Block,
            window_pages: 16,
        }
    }
}

/// The thread's whole state.
pub(crate) struct Worker {
    ring: Ring,
    jobs: ReadJobs,
    residency: Residency,
    events: EventBuffer,
    roster: Roster,
    /// Places of sessions with events to read, in the order they get their turn.
    ready: VecDeque<u32>,
    /// Places of sessions with work that nobody waits for.
    background: VecDeque<u32>,
    /// The session whose fault was answered last; only kept to spin on.
    hot: Option<(u32, u32)>,
    /// Nothing has to be done before this, if nothing happens.
    next_due: Option<Instant>,
    inbox: Receiver<Command>,
    bell: Arc<EventFd>,
    outbox: Outbox,
    options: WorkerOptions,
    /// Where it is pinned.
    cpu: Option<usize>,
}

impl Worker {
    /// Must be called on the thread that will run it.
    pub(crate) fn new(
        inbox: Receiver<Command>,
        bell: Arc<EventFd>,
        outbox: Outbox,
        options: WorkerOptions,
        cpu: Option<usize>,
    ) -> io::Result<Self> {
        // A slot holds one window of 4 KiB pages.
        let slot_bytes = (options.window_pages * 4096) as usize;
        let buffers = ReadBuffers::new(options.read_slots, slot_bytes)?;
        let mut ring = Ring::new(256, buffers, HUGE_READ_SLOTS)?;
        ring.poll_readable(
            bell.as_fd(),
            Token {
                kind: kind::MAILBOX,
                index: 0,
                stamp: 0,
            },
        )?;
        Ok(Self {
            jobs: ReadJobs::new(options.read_slots, HUGE_READ_SLOTS),
            ring,
            residency: Residency::default(),
            events: EventBuffer::default(),
            roster: Roster::default(),
            ready: VecDeque::new(),
            background: VecDeque::new(),
            hot: None,
            next_due: None,
            inbox,
            bell,
            outbox,
            options,
            cpu,
        })
    }

    /// Serves until told to stop.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        loop {
            if let Waiting::Spin { us } = self.options.waiting {
                self.spin(Duration::from_micros(us));
            }
            self.ring.wait(self.patience())?;
            while let Some(completion) = self.ring.next_completion() {
                if !self.complete(completion)? {
                    return Ok(());
                }
            }
            for _ in 0..self.ready.len() {
                if let Some(index) = self.ready.pop_front() {
                    self.take_turn(index);
                }
            }
            if self.ready.is_empty() {
                self.step_background();
            }
            self.look_at_clock()?;
        }
    }

    /// Serves the hot session without waiting, for as long as it goes on faulting; everybody
    /// else is looked after at least every [`LONGEST_SPIN`].
    fn spin(&mut self, patience: Duration) {
        let Some((index, stamp)) = self.hot.take() else {
            return;
        };
        let begun = Instant::now();
        let mut last = begun;
        loop {
            if self.roster.get(index, stamp).is_none() || !self.ready.is_empty() {
                return;
            }
            self.take_turn(index);
            let now = Instant::now();
            if !self.events.is_empty() {
                self.hot = Some((index, stamp));
                last = now;
            }
            if now - last >= patience || now - begun >= LONGEST_SPIN {
                return;
            }
            std::thread::yield_now();
        }
    }

    /// How long the next wait may last.
    fn patience(&self) -> Option<Duration> {
        if !self.ready.is_empty() || self.hot.is_some() || !self.background.is_empty() {
            return Some(Duration::ZERO);
        }
        self.next_due
            .map(|due| due.saturating_duration_since(Instant::now()))
    }

    fn note_due(&mut self, due: Option<Instant>) {
        self.next_due = match (self.next_due, due) {
            (Some(known), Some(due)) => Some(known.min(due)),
            (known, due) => known.or(due),
        };
    }

    /// `false` means stop.
    fn complete(&mut self, completion: Completion) -> io::Result<bool> {
        let token = completion.token;
        match token.kind {
            kind::MAILBOX => {
                let _ = self.bell.read();
                while let Ok(command) = self.inbox.try_recv() {
                    if !self.obey(command)? {
                        return Ok(false);
                    }
                }
                if !completion.more {
                    self.ring.poll_readable(self.bell.as_fd(), token)?;
                }
            }
            kind::UFFD => self.uffd_ready(completion)?,
            kind::READ => self.read_done(completion),
            kind::LISTENER | kind::CONNECTION => self.handoff_step(token)?,
            kind::VMM => {
                if let Some(entry) = self.roster.get(token.index, token.stamp) {
                    let session = entry.name.clone();
                    self.outbox.send(&Report::Ended { session }, &[]);
                }
            }
            cancelled if cancelled & kind::CANCELLED != 0 => self.cancelled(completion)?,
            _ => {}
        }
        Ok(true)
    }

    fn uffd_ready(&mut self, completion: Completion) -> io::Result<()> {
        let token = completion.token;
        let Some(entry) = self.roster.get(token.index, token.stamp) else {
            return Ok(());
        };
        if !std::mem::replace(&mut entry.ready, true) {
            self.ready.push_back(token.index);
        }
        if !completion.more
            && let Phase::Serving(session) = &entry.phase
        {
            self.ring.poll_readable(session.uffd().as_fd(), token)?;
        }
        Ok(())
    }

    /// One bounded turn of one session.
    fn take_turn(&mut self, index: u32) {
        let Some(entry) = self.roster.at(index) else {
            return;
        };
        entry.ready = false;
        let stamp = entry.stamp;
        let Phase::Serving(session) = &mut entry.phase else {
            return;
        };
        let mut reader = Reader {
            ring: &mut self.ring,
            jobs: &mut self.jobs,
            residency: &mut self.residency,
            index,
            stamp: entry.stamp,
        };
        let more = session.turn(&mut self.events, &mut reader);
        report_failure(&self.outbox, &entry.name, session);
        let due = session.next_due();
        if self.options.waiting != Waiting::Block && !self.events.is_empty() {
            self.hot = Some((index, stamp));
        }
        if more {
            entry.ready = true;
            self.ready.push_back(index);
        }
        self.note_due(due);
    }

    /// Queues a session for work that nobody waits for.
    fn queue_background(&mut self, index: u32) {
        if let Some(entry) = self.roster.at(index)
            && let Phase::Serving(session) = &mut entry.phase
            && !std::mem::replace(&mut session.background.queued, true)
        {
            self.background.push_back(index);
        }
    }

    /// One step of one session.
    fn step_background(&mut self) {
        let Some(index) = self.background.pop_front() else {
            return;
        };
        let Some(entry) = self.roster.at(index) else {
            return;
        };
        let Phase::Serving(session) = &mut entry.phase else {
            return;
        };
        let mut reader = Reader {
            ring: &mut self.ring,
            jobs: &mut self.jobs,
            residency: &mut self.residency,
            index,
            stamp: entry.stamp,
        };
        session.background.queued = false;
        let progress = session.background_step(&mut reader, Instant::now());
        report_failure(&self.outbox, &entry.name, session);
        if let Some(pages) = session.background.loaded.take() {
            let session = entry.name.clone();
            self.outbox.send(&Report::Loaded { session, pages }, &[]);
        }
        match progress {
            Progress::More => self.queue_background(index),
            Progress::NotBefore(due) => self.note_due(Some(due)),
            Progress::Over => {}
        }
    }

    fn read_done(&mut self, completion: Completion) {
        let Some(job) = self.jobs.finish(completion.token) else {
            return;
        };
        let slot = completion.token.index as usize;
        let outcome = outcome_of(&job, completion.result).map(|()| self.ring.slot_source(slot));
        let mut due = None;
        if let Some(entry) = self.roster.get(job.index, job.stamp)
            && let Phase::Serving(session) = &mut entry.phase
        {
            session.read_done(job.request, outcome, Instant::now());
            report_failure(&self.outbox, &entry.name, session);
            due = session.next_due();
        }
        self.jobs.release(slot);
        self.note_due(due);
    }

    /// Retries that are due, and hand-offs that are overdue.
    fn look_at_clock(&mut self) -> io::Result<()> {
        let Some(due) = self.next_due else {
            return Ok(());
        };
        let now = Instant::now();
        if due > now {
            return Ok(());
        }
        self.next_due = None;
        for index in 0..self.roster.places() {
            let Some(entry) = self.roster.at(index) else {
                continue;
            };
            let due = match &entry.phase {
                Phase::Serving(session) => session.next_due(),
                Phase::Expecting { expecting, .. } => Some(expecting.deadline),
            };
            if due.is_some_and(|due| due <= now) {
                self.overdue(index, now)?;
            } else {
                self.note_due(due);
            }
        }
        Ok(())
    }

    fn overdue(&mut self, index: u32, now: Instant) -> io::Result<()> {
        if let Some(Entry {
            phase: Phase::Expecting { request, .. },
            ..
        }) = self.roster.at(index)
        {
            let request = *request;
            self.remove(index)?;
            self.refuse(request, &ExpectError::Deadline);
            return Ok(());
        }
        // What blocks a retry may be an unread event: those first.
        self.take_turn(index);
        if let Some(entry) = self.roster.at(index)
            && let Phase::Serving(session) = &mut entry.phase
        {
            let mut reader = Reader {
                ring: &mut self.ring,
                jobs: &mut self.jobs,
                residency: &mut self.residency,
                index,
                stamp: entry.stamp,
            };
            session.retry_due(now, &mut reader);
            report_failure(&self.outbox, &entry.name, session);
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
        }
        Ok(())
    }

    fn refuse(&self, request: u64, error: &dyn std::error::Error) {
        let reason = crate::chain(error);
        self.outbox.send(&Report::Refused { request, reason }, &[]);
    }

    /// For the token of a read that [`Reader`] starts.
    pub(crate) const fn read_token(slot: usize, stamp: u32) -> Token {
        Token {
            kind: kind::READ,
            index: slot as u32,
            stamp,
        }
    }
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

fn report_failure(outbox: &Outbox, name: &str, session: &mut Session) {
    if let Some(reason) = session.take_failure() {
        outbox.send(
            &Report::Failed {
                session: name.to_owned(),
                reason,
            },
            &[],
        );
    }
}
