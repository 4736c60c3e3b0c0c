//! What a worker is told to do, and how sessions come and go.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crossbeam_channel::{SendError, Sender};
use snapshot_format::PageRun;

use super::{Worker, kind};
use crate::control::Report;
use crate::counters::SessionStats;
use crate::expecting::{Expecting, claims_of};
use crate::outbox::Outbox;
use crate::read_jobs::PageReads;
use crate::recording::{self, Recording};
use crate::roster::{Entry, Phase};
use crate::session::{Session, SessionParts};
use crate::sys::ring::{Completion, Token};
use crate::tracking::Tracking;

/// How long a session has had no event before it is moved: it won't have one right now.
const IDLE_BEFORE_A_MOVE: Duration = Duration::from_millis(50);

/// One order; every one but `Stop` is answered with the number of its request.
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
    },
    Detach {
        request: u64,
        session: String,
    },
    Stats {
        request: u64,
        session: String,
    },
    /// Something that a session does ahead of its faults.
    Ahead {
        request: u64,
        session: String,
        order: AheadOrder,
    },
    /// Give an idle session away, if there is one.
    GiveAway {
        taker: Sender<Option<Moving>>,
    },
    /// Give every session away that has memory, whatever is under way for it.
    GiveAllAway {
        taker: Sender<Vec<Moving>>,
    },
    /// Go on with a session that was given away.
    Take(Moving),
    Stop,
}

/// A session without a worker: on its way to another, or to another engine. Its events wait in
/// the kernel meanwhile.
pub(crate) struct Moving {
    pub(crate) name: String,
    pub(crate) session: Box<Session>,
}

/// What a session is to do ahead of its faults, or to end.
pub(crate) enum AheadOrder {
    Record { window: Duration, max_pages: usize },
    EndRecording,
    Track(Tracking),
    Replay { runs: Vec<PageRun> },
    Load { bytes_per_second: u64 },
    Halt,
}

impl Worker {
    /// `false` means stop.
    pub(super) fn obey(&mut self, command: Command) -> io::Result<bool> {
        match command {
            Command::Stop => return Ok(false),
            Command::Expect {
                request,
                session,
                expecting,
            } => {
                self.note_due(Some(expecting.deadline));
                let phase = Phase::Expecting { request, expecting };
                let (index, entry) = self.roster.insert(session, phase);
                let token = Token {
                    kind: kind::LISTENER,
                    index,
                    stamp: entry.stamp,
                };
                if let Phase::Expecting { expecting, .. } = &entry.phase {
                    self.reads
                        .ring
                        .poll_readable(expecting.listener.as_fd(), token)?;
                }
            }
            Command::Adopt {
                request,
                session,
                parts,
            } => {
                let regions = claims_of(&parts.regions);
                // Faults that the dead engine had read are reported again.
                parts.wake_all();
                self.serve(session.clone(), *parts)?;
                // The daemon knows the process: it sent the pidfd.
                self.outbox.send(
                    &Report::Attached {
                        request,
                        session,
                        peer_pid: 0,
                        regions,
                        worker_cpu: self.cpu,
                    },
                    &[],
                );
            }
            Command::Detach { request, session } => {
                let taken = match self.roster.find(&session) {
                    Some(index) => self.remove(index)?,
                    None => None,
                };
                match taken {
                    Some(mut entry) => {
                        if let Phase::Serving(session) = &mut entry.phase
                            && let Some(recording) = session.take_recording()
                        {
                            send_recording(&self.outbox, &entry.name, &recording);
                        }
                        let stats = stats_of(&entry.phase);
                        self.outbox.send(&Report::Detached { request, stats }, &[]);
                    }
                    None => self.unknown(request, &session),
                }
            }
            Command::Stats { request, session } => {
                let found = self
                    .roster
                    .find(&session)
                    .and_then(|index| self.roster.at(index));
                match found.map(|entry| stats_of(&entry.phase)) {
                    Some(stats) => self.outbox.send(&Report::Stats { request, stats }, &[]),
                    None => self.unknown(request, &session),
                }
            }
            Command::Ahead {
                request,
                session,
                order,
            } => self.ahead(request, &session, order),
            Command::GiveAway { taker } => {
                let moving = self.give_away()?;
                if let Err(SendError(Some(moving))) = taker.send(moving) {
                    // Nobody waits for it any more.
                    self.go_on(moving.name, moving.session)?;
                }
            }
            Command::GiveAllAway { taker } => {
                let all = self.give_all_away()?;
                if let Err(SendError(all)) = taker.send(all) {
                    // Nobody waits for them any more.
                    for mut moving in all {
                        moving.session.start_over();
                        self.go_on(moving.name, moving.session)?;
                    }
                }
            }
            Command::Take(Moving { name, session }) => self.go_on(name, session)?,
        }
        Ok(true)
    }

    fn ahead(&mut self, request: u64, name: &str, order: AheadOrder) {
        let found = self.roster.find(name);
        let entry = found.and_then(|index| Some((index, self.roster.at(index)?)));
        let Some((index, entry)) = entry else {
            return self.unknown(request, name);
        };
        let Phase::Serving(session) = &mut entry.phase else {
            let reason = format!("No VMM has handed its memory over to session {name:?}");
            return self.outbox.send(&Report::Refused { request, reason }, &[]);
        };
        match order {
            AheadOrder::Record { window, max_pages } => session.record(window, max_pages),
            AheadOrder::EndRecording => {
                if let Some(recording) = session.take_recording() {
                    send_recording(&self.outbox, name, &recording);
                }
            }
            AheadOrder::Track(tracking) => {
                if let Err(error) = session.track_writes(tracking) {
                    let reason = format!("Tracking writes: {error}");
                    return self.outbox.send(&Report::Refused { request, reason }, &[]);
                }
            }
            AheadOrder::Replay { runs } => session.replay(runs),
            AheadOrder::Load { bytes_per_second } => {
                session.load(bytes_per_second, Instant::now());
            }
            AheadOrder::Halt => session.halt(),
        }
        let stats = session.stats();
        self.outbox.send(&Report::Stats { request, stats }, &[]);
        self.queue_background(index);
    }

    fn unknown(&self, request: u64, session: &str) {
        let reason = format!("This engine has no session {session:?}");
        self.outbox.send(&Report::Refused { request, reason }, &[]);
    }

    pub(super) fn serve(&mut self, name: String, parts: SessionParts) -> io::Result<()> {
        self.go_on(
            name,
            Box::new(Session::new(parts, self.options.window_pages)),
        )
    }

    fn go_on(&mut self, name: String, session: Box<Session>) -> io::Result<()> {
        self.reads.files.enter(session.source());
        let (index, entry) = self.roster.insert(name, Phase::Serving(session));
        if let Phase::Serving(session) = &entry.phase {
            let token = Token {
                kind: kind::VMM,
                index,
                stamp: entry.stamp,
            };
            self.reads.ring.poll_readable(session.pidfd(), token)?;
        }
        // Events may have queued up before the poll was armed.
        entry.ready = true;
        self.ready.push_back(index);
        self.arm(index)
    }

    /// Takes out a session that has nothing under way, and had nothing for a while.
    fn give_away(&mut self) -> io::Result<Option<Moving>> {
        let now = Instant::now();
        let idle = (0..self.roster.places()).find(|index| {
            let jobs = &self.reads.jobs;
            let queued = self.background.contains(index) || jobs.are_lent(*index);
            self.roster
                .at(*index)
                .is_some_and(|entry| match &entry.phase {
                    Phase::Serving(session) => {
                        !entry.ready && !queued && session.is_idle(now, IDLE_BEFORE_A_MOVE)
                    }
                    Phase::Expecting { .. } => false,
                })
        });
        let taken = match idle {
            Some(index) => self.remove(index)?,
            None => None,
        };
        let moving = taken.and_then(moving);
        Ok(moving.map(|mut moving| {
            moving.session.counters.moves += 1;
            moving
        }))
    }

    /// Takes out all sessions that have memory. Reads that are under way for them come to nothing.
    fn give_all_away(&mut self) -> io::Result<Vec<Moving>> {
        let mut all = Vec::new();
        for index in 0..self.roster.places() {
            let entry = self.roster.at(index);
            if entry.is_some_and(|entry| matches!(entry.phase, Phase::Serving(_))) {
                all.extend(self.remove(index)?.and_then(moving));
            }
        }
        Ok(all)
    }

    /// Takes an entry out and has the ring let go of its descriptors: a poll would keep
    /// them open.
    pub(super) fn remove(&mut self, index: u32) -> io::Result<Option<Entry>> {
        let Some(entry) = self.roster.take(index) else {
            return Ok(None);
        };
        let kinds = match &entry.phase {
            Phase::Expecting { .. } => [kind::LISTENER, kind::CONNECTION],
            Phase::Serving(_) => [kind::UFFD, kind::VMM],
        };
        for kind in kinds {
            let poll = Token {
                kind,
                index,
                stamp: entry.stamp,
            };
            self.cancel(poll)?;
        }
        if let Phase::Serving(session) = &entry.phase {
            let PageReads { ring, files, .. } = &mut self.reads;
            files.leave(session.source(), ring);
        }
        self.ready.retain(|ready| *ready != index);
        self.background.retain(|queued| *queued != index);
        Ok(Some(entry))
    }

    fn cancel(&mut self, poll: Token) -> io::Result<()> {
        let done = Token {
            kind: poll.kind | kind::CANCELLED,
            ..poll
        };
        self.reads.ring.cancel_poll(poll, done)
    }

    /// A poll that was just reporting can't be cancelled, goes on, and would keep its
    /// descriptor open for ever: a VMM would wait for an answer from nobody.
    pub(super) fn cancelled(&mut self, completion: Completion) -> io::Result<()> {
        if completion.result == -libc::EALREADY {
            let token = completion.token;
            self.cancel(Token {
                kind: token.kind & !kind::CANCELLED,
                ..token
            })?;
        }
        Ok(())
    }
}

fn moving(entry: Entry) -> Option<Moving> {
    let Phase::Serving(session) = entry.phase else {
        return None;
    };
    let name = entry.name;
    Some(Moving { name, session })
}

fn stats_of(phase: &Phase) -> SessionStats {
    match phase {
        Phase::Serving(session) => session.stats(),
        Phase::Expecting { .. } => SessionStats::default(),
    }
}

/// Sends what was recorded of a session; without a daemon, or memory for it, it is lost.
pub(super) fn send_recording(outbox: &Outbox, session: &str, recording: &Recording) {
    match recording::to_memfd(recording.touches()) {
        Ok((memfd, pages)) => {
            let session = session.to_owned();
            outbox.send(&Report::Recorded { session, pages }, &[memfd.as_fd()]);
        }
        Err(error) => tracing::warn!(session, %error, "A recording is lost"),
    }
}
