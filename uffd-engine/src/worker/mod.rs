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
mod options;
mod turns;

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use nix::sys::eventfd::EventFd;

use crate::control::Report;
use crate::data_files::DataFiles;
use crate::expecting::ExpectError;
use crate::outbox::Outbox;
use crate::read_jobs::{PageReads, ReadJobs};
use crate::residency::Residency;
use crate::roster::{Entry, Phase, Roster};
use crate::sys::mapping::ReadBuffers;
use crate::sys::ring::{Completion, Ring, Token};
use crate::sys::uffd::EventBuffer;

pub(crate) use command::{AheadOrder, Command, Moving};
pub use options::{Waiting, WorkerOptions};
use turns::Hot;

/// Reads of huge pages in flight at most; their buffers exist once one is served.
const HUGE_READ_SLOTS: usize = 8;

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

/// The thread's whole state.
pub(crate) struct Worker {
    reads: PageReads,
    events: EventBuffer,
    roster: Roster,
    /// Places of sessions with events to read, in the order they get their turn.
    ready: VecDeque<u32>,
    /// Places of sessions with work that nobody waits for.
    background: VecDeque<u32>,
    /// The session whose fault was answered last; only kept to spin on. Its descriptor is not
    /// polled: that would make its guest pay for waking who is awake.
    hot: Option<Hot>,
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
            reads: PageReads {
                ring,
                jobs: ReadJobs::new(options.read_slots, HUGE_READ_SLOTS),
                residency: Residency::default(),
                files: DataFiles::default(),
            },
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
                self.spin(Duration::from_micros(us))?;
            }
            self.reads.ring.wait(self.patience())?;
            while let Some(completion) = self.reads.ring.next_completion() {
                if !self.complete(completion)? {
                    return Ok(());
                }
            }
            for _ in 0..self.ready.len() {
                if let Some(index) = self.ready.pop_front() {
                    self.take_turn(index)?;
                }
            }
            if self.ready.is_empty() {
                self.step_background();
            }
            self.look_at_clock()?;
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
                    self.reads.ring.poll_readable(self.bell.as_fd(), token)?;
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
        if !completion.more {
            entry.armed = false;
            // One that is polled once at a time is polled again after its turn.
            if self.options.waiting == Waiting::Block {
                self.arm(token.index)?;
            }
        }
        Ok(())
    }

    /// Has the ring report the next event of a session.
    fn arm(&mut self, index: u32) -> io::Result<()> {
        let Some(entry) = self.roster.at(index) else {
            return Ok(());
        };
        let Phase::Serving(session) = &entry.phase else {
            return Ok(());
        };
        if std::mem::replace(&mut entry.armed, true) {
            return Ok(());
        }
        let token = Token {
            kind: kind::UFFD,
            index,
            stamp: entry.stamp,
        };
        let fd = session.guest().as_fd();
        match self.options.waiting {
            Waiting::Block => self.reads.ring.poll_readable(fd, token),
            Waiting::Spin { .. } => self.reads.ring.poll_readable_once(fd, token),
        }
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
        self.take_turn(index)?;
        self.retry(index, now);
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
