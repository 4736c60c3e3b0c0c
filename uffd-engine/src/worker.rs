//! One pinned thread that serves its sessions: one ring, one wait, bounded turns.
//!
//! ```text
//!   wait ─▶ completions ─▶ one turn per ready session (≤ 64 events) ─▶ due retries ─┐
//!    ▲                                                                             │
//!    └──────────── (no wait while a session is still ready) ◀──────────────────────┘
//! ```
//!
//! Nothing is shared with other workers. Commands come through a channel whose
//! eventfd is polled like everything else. A storm in one sandbox costs the others
//! one turn of 64 events at a time.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use nix::sys::eventfd::EventFd;

use crate::control::Report;
use crate::expecting::{Expecting, Step, claims_of};
use crate::outbox::Outbox;
use crate::read_jobs::{ReadJobs, Reader};
use crate::session::{Session, SessionParts};
use crate::sys::mapping::ReadBuffers;
use crate::sys::ring::{Completion, Ring, Token};
use crate::sys::uffd::EventBuffer;

mod kind {
    pub(super) const MAILBOX: u8 = 1;
    pub(super) const LISTENER: u8 = 2;
    pub(super) const CONNECTION: u8 = 3;
    pub(super) const UFFD: u8 = 4;
    pub(super) const VMM: u8 = 5;
    pub(super) const READ: u8 = 6;
    pub(super) const CANCELLED: u8 = 7;
}

/// How a worker is set up.
#[derive(Clone, Copy, Debug)]
pub struct WorkerOptions {
    /// Reads in flight at most.
    pub read_slots: usize,
    /// Pages installed around a fault whose content is at hand; a power of two.
    pub window_pages: u64,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            read_slots: 64,
            window_pages: 4,
        }
    }
}

/// What a worker is told to do.
pub(crate) enum Command {
    Expect {
        request: u64,
        session: String,
        expecting: Box<Expecting>,
    },
    Adopt {
        request: u64,
        session: String,
        parts: Box<SessionParts>,
        peer_pid: i32,
    },
    Detach {
        request: u64,
        session: String,
    },
    Stats {
        request: u64,
        session: String,
    },
    Stop,
}

struct Entry {
    name: String,
    stamp: u32,
    phase: Phase,
    ready: bool,
}

enum Phase {
    Expecting {
        request: u64,
        expecting: Box<Expecting>,
    },
    Serving(Box<Session>),
}

/// The thread's whole state.
pub(crate) struct Worker {
    ring: Ring,
    jobs: ReadJobs,
    events: EventBuffer,
    entries: Vec<Option<Entry>>,
    ready: VecDeque<u32>,
    next_stamp: u32,
    inbox: Receiver<Command>,
    bell: Arc<EventFd>,
    outbox: Outbox,
    options: WorkerOptions,
}

impl Worker {
    /// Must be called on the thread that will run it.
    pub(crate) fn new(
        inbox: Receiver<Command>,
        bell: Arc<EventFd>,
        outbox: Outbox,
        options: WorkerOptions,
    ) -> io::Result<Self> {
        // A slot holds one window of the largest page size that is read (4 KiB pages).
        let slot_bytes = (options.window_pages * 4096) as usize;
        let buffers = ReadBuffers::new(options.read_slots, slot_bytes)?;
        let mut ring = Ring::new(256, buffers)?;
        ring.poll_readable(
            bell.as_fd(),
            Token {
                kind: kind::MAILBOX,
                index: 0,
                stamp: 0,
            },
        )?;
        Ok(Self {
            jobs: ReadJobs::new(ring.slots()),
            ring,
            events: EventBuffer::default(),
            entries: Vec::new(),
            ready: VecDeque::new(),
            next_stamp: 1,
            inbox,
            bell,
            outbox,
            options,
        })
    }

    /// Serves until told to stop.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        loop {
            self.ring.wait(self.patience())?;
            while let Some(completion) = self.ring.next_completion() {
                if !self.complete(completion)? {
                    return Ok(());
                }
            }
            for _ in 0..self.ready.len() {
                self.take_turn();
            }
            self.look_at_clocks()?;
        }
    }

    /// How long the next wait may last.
    fn patience(&self) -> Option<Duration> {
        if !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        let due = self
            .entries
            .iter()
            .flatten()
            .filter_map(|entry| match &entry.phase {
                Phase::Expecting { expecting, .. } => Some(expecting.deadline),
                Phase::Serving(session) => session.next_retry(),
            });
        due.min()
            .map(|at| at.saturating_duration_since(Instant::now()))
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
            kind::READ => self.read_done(completion),
            kind::LISTENER | kind::CONNECTION => self.handoff_step(completion)?,
            kind::UFFD => self.uffd_ready(completion)?,
            kind::VMM => {
                if let Some(entry) = self.entry(token) {
                    let session = entry.name.clone();
                    self.outbox.send(&Report::Ended { session }, &[]);
                }
            }
            _ => {}
        }
        Ok(true)
    }

    fn entry(&mut self, token: Token) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(token.index as usize)?.as_mut()?;
        (entry.stamp == token.stamp).then_some(entry)
    }

    fn uffd_ready(&mut self, completion: Completion) -> io::Result<()> {
        let Some(entry) = self.entry(completion.token) else {
            return Ok(());
        };
        if !std::mem::replace(&mut entry.ready, true) {
            self.ready.push_back(completion.token.index);
        }
        if !completion.more
            && let Some(Entry {
                phase: Phase::Serving(session),
                ..
            }) = self.entries[completion.token.index as usize].as_ref()
        {
            self.ring
                .poll_readable(session.uffd().as_fd(), completion.token)?;
        }
        Ok(())
    }

    /// One bounded turn of the session that has waited longest.
    fn take_turn(&mut self) {
        let Some(index) = self.ready.pop_front() else {
            return;
        };
        let Some(entry) = self.entries[index as usize].as_mut() else {
            return;
        };
        entry.ready = false;
        let Phase::Serving(session) = &mut entry.phase else {
            return;
        };
        let mut reader = Reader {
            ring: &mut self.ring,
            jobs: &mut self.jobs,
            index,
            stamp: entry.stamp,
        };
        let more = session.turn(&mut self.events, &mut reader);
        report_failure(&self.outbox, &entry.name, session);
        if more {
            entry.ready = true;
            self.ready.push_back(index);
        }
    }

    /// Retries that are due, and hand-offs that are overdue.
    fn look_at_clocks(&mut self) -> io::Result<()> {
        let now = Instant::now();
        for index in 0..self.entries.len() as u32 {
            let Some(entry) = self.entries[index as usize].as_mut() else {
                continue;
            };
            match &mut entry.phase {
                Phase::Serving(session) => {
                    if session.next_retry().is_some_and(|due| due <= now) {
                        let stamp = entry.stamp;
                        let mut reader = Reader {
                            ring: &mut self.ring,
                            jobs: &mut self.jobs,
                            index,
                            stamp,
                        };
                        // What blocks the retry may be an unread event: those first.
                        session.turn(&mut self.events, &mut reader);
                        session.retry_due(now, &mut reader);
                        report_failure(&self.outbox, &entry.name, session);
                    }
                }
                Phase::Expecting { request, expecting } => {
                    if expecting.deadline <= now {
                        let request = *request;
                        let reason = crate::expecting::ExpectError::Deadline.to_string();
                        self.remove(index)?;
                        self.outbox.send(&Report::Refused { request, reason }, &[]);
                    }
                }
            }
        }
        Ok(())
    }

    fn read_done(&mut self, completion: Completion) {
        let Some(job) = self.jobs.finish(completion.token) else {
            return;
        };
        let expected = job.request.pages.get() * 4096;
        let slot = completion.token.index as usize;
        let outcome = if completion.result < 0 {
            let error = io::Error::from_raw_os_error(-completion.result);
            Err(format!(
                "Reading page {:#x} of its build: {error}",
                job.request.first.get()
            ))
        } else if (completion.result as u64) < expected {
            let page = job.request.first.get();
            let found = completion.result;
            Err(format!(
                "Page {page:#x} of its build is cut: expected {expected} bytes, found {found}"
            ))
        } else {
            Ok(self.ring.slot_source(slot))
        };
        let token = Token {
            kind: kind::UFFD,
            index: job.index,
            stamp: job.stamp,
        };
        if let Some(Entry {
            name,
            phase: Phase::Serving(session),
            ..
        }) = self.entry(token)
        {
            session.read_done(job.request, outcome);
            let (name, failure) = (name.clone(), session.take_failure());
            if let Some(reason) = failure {
                self.outbox.send(
                    &Report::Failed {
                        session: name,
                        reason,
                    },
                    &[],
                );
            }
        }
        self.jobs.release(slot);
    }

    fn handoff_step(&mut self, completion: Completion) -> io::Result<()> {
        let token = completion.token;
        let Some(entry) = self.entry(token) else {
            return Ok(());
        };
        let Phase::Expecting { request, expecting } = &mut entry.phase else {
            return Ok(());
        };
        let request = *request;
        let step = if token.kind == kind::LISTENER {
            expecting.accept()
        } else {
            expecting.receive()
        };
        match step {
            Ok(Step::Wait) => {}
            Ok(Step::Connected) => {
                let Some(Entry {
                    phase: Phase::Expecting { expecting, .. },
                    ..
                }) = &self.entries[token.index as usize]
                else {
                    return Ok(());
                };
                if let Some(connection) = expecting.connection() {
                    let token = Token {
                        kind: kind::CONNECTION,
                        ..token
                    };
                    self.ring.poll_readable(connection, token)?;
                }
            }
            Ok(Step::Complete(regions)) => {
                let claims = claims_of(&regions);
                let Some((name, Phase::Expecting { expecting, .. })) = self.remove(token.index)?
                else {
                    return Ok(());
                };
                match expecting.into_parts(regions) {
                    Ok((parts, peer_pid)) => {
                        let kept = parts.uffd.try_clone();
                        self.serve(name, parts)?;
                        let report = Report::Attached {
                            request,
                            peer_pid,
                            regions: claims,
                        };
                        match &kept {
                            Ok(uffd) => self.outbox.send(&report, &[uffd.as_fd()]),
                            Err(_) => self.outbox.send(&report, &[]),
                        }
                    }
                    Err(error) => self.refuse(request, &error),
                }
            }
            Err(error) => {
                self.remove(token.index)?;
                self.refuse(request, &error);
            }
        }
        Ok(())
    }

    fn refuse(&self, request: u64, error: &dyn std::error::Error) {
        self.outbox.send(
            &Report::Refused {
                request,
                reason: crate::chain(error),
            },
            &[],
        );
    }

    /// `false` means stop.
    fn obey(&mut self, command: Command) -> io::Result<bool> {
        match command {
            Command::Stop => return Ok(false),
            Command::Expect {
                request,
                session,
                expecting,
            } => {
                let index = self.insert(session, Phase::Expecting { request, expecting });
                let Some(entry) = &self.entries[index as usize] else {
                    return Ok(true);
                };
                let Phase::Expecting { expecting, .. } = &entry.phase else {
                    return Ok(true);
                };
                let token = Token {
                    kind: kind::LISTENER,
                    index,
                    stamp: entry.stamp,
                };
                self.ring.poll_readable(expecting.listener.as_fd(), token)?;
            }
            Command::Adopt {
                request,
                session,
                parts,
                peer_pid,
            } => {
                let claims = claims_of(&parts.regions);
                for region in parts.regions.regions() {
                    // Faults that the dead engine had read are reported again.
                    let _ = parts
                        .uffd
                        .wake(region.base, region.pages.get() * parts.regions.page_bytes());
                }
                self.serve(session, *parts)?;
                self.outbox.send(
                    &Report::Attached {
                        request,
                        peer_pid,
                        regions: claims,
                    },
                    &[],
                );
            }
            Command::Detach { request, session } => match self.find(&session) {
                Some(index) => {
                    let stats = match self.remove(index)? {
                        Some((_, Phase::Serving(session))) => session.stats(),
                        _ => crate::counters::SessionStats::default(),
                    };
                    self.outbox.send(&Report::Detached { request, stats }, &[]);
                }
                None => self.unknown(request, &session),
            },
            Command::Stats { request, session } => match self.find(&session) {
                Some(index) => {
                    let stats = match self.entries[index as usize].as_ref().map(|e| &e.phase) {
                        Some(Phase::Serving(session)) => session.stats(),
                        _ => crate::counters::SessionStats::default(),
                    };
                    self.outbox.send(&Report::Stats { request, stats }, &[]);
                }
                None => self.unknown(request, &session),
            },
        }
        Ok(true)
    }

    fn unknown(&self, request: u64, session: &str) {
        let reason = format!("This engine has no session {session:?}");
        self.outbox.send(&Report::Refused { request, reason }, &[]);
    }

    fn find(&self, name: &str) -> Option<u32> {
        let at = self
            .entries
            .iter()
            .position(|e| e.as_ref().is_some_and(|e| e.name == name))?;
        Some(at as u32)
    }

    fn insert(&mut self, name: String, phase: Phase) -> u32 {
        let stamp = self.next_stamp;
        self.next_stamp = self.next_stamp.wrapping_add(1).max(1);
        let entry = Some(Entry {
            name,
            stamp,
            phase,
            ready: false,
        });
        match self.entries.iter().position(Option::is_none) {
            Some(index) => {
                self.entries[index] = entry;
                index as u32
            }
            None => {
                self.entries.push(entry);
                self.entries.len() as u32 - 1
            }
        }
    }

    fn serve(&mut self, name: String, parts: SessionParts) -> io::Result<()> {
        let session = Box::new(Session::new(parts, self.options.window_pages));
        let index = self.insert(name, Phase::Serving(session));
        let Some(entry) = &mut self.entries[index as usize] else {
            return Ok(());
        };
        let Phase::Serving(session) = &entry.phase else {
            return Ok(());
        };
        let token = |kind| Token {
            kind,
            index,
            stamp: entry.stamp,
        };
        self.ring
            .poll_readable(session.uffd().as_fd(), token(kind::UFFD))?;
        self.ring.poll_readable(session.pidfd(), token(kind::VMM))?;
        // Events may have queued up before the poll was armed.
        entry.ready = true;
        self.ready.push_back(index);
        Ok(())
    }

    /// Takes an entry out and lets the ring go of its descriptors: a poll would keep
    /// them open.
    fn remove(&mut self, index: u32) -> io::Result<Option<(String, Phase)>> {
        let Some(entry) = self.entries[index as usize].take() else {
            return Ok(None);
        };
        let kinds: &[u8] = match &entry.phase {
            Phase::Expecting { .. } => &[kind::LISTENER, kind::CONNECTION],
            Phase::Serving(_) => &[kind::UFFD, kind::VMM],
        };
        for kind in kinds {
            let poll = Token {
                kind: *kind,
                index,
                stamp: entry.stamp,
            };
            self.ring.cancel_poll(
                poll,
                Token {
                    kind: kind::CANCELLED,
                    ..poll
                },
            )?;
        }
        self.ready.retain(|ready| *ready != index);
        Ok(Some((entry.name, entry.phase)))
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
