//! An engine's workers as its control thread sees them: who has how many sessions, and idle
//! sessions that move to even that out.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::Sender;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;

use super::EngineOptions;
use crate::outbox::Outbox;
use crate::worker::{Command, Moving, Worker};

struct WorkerHandle {
    inbox: Sender<Command>,
    bell: Arc<EventFd>,
    sessions: usize,
    thread: JoinHandle<()>,
}

impl WorkerHandle {
    fn tell(&self, command: Command) {
        // A worker that has ended took its sessions with it; the daemon sees the process go.
        if self.inbox.send(command).is_ok() {
            let _ = self.bell.write(1);
        }
    }

    /// The same for a worker that may be stuck; `false` when it is.
    fn tell_before(&self, deadline: Instant, command: Command) -> bool {
        let sent = self.inbox.send_deadline(command, deadline).is_ok();
        if sent {
            let _ = self.bell.write(1);
        }
        sent
    }
}

/// All workers of an engine.
pub(super) struct Workers {
    all: Vec<WorkerHandle>,
}

impl Workers {
    /// Starts their threads, pinned where that was asked for.
    pub(super) fn start(options: &EngineOptions, outbox: &Outbox) -> io::Result<Self> {
        Ok(Self {
            all: start_workers(options, outbox)?,
        })
    }

    /// Counts one more session of the worker with fewest, and says which that is.
    pub(super) fn engage(&mut self) -> usize {
        let idlest = self
            .all
            .iter()
            .enumerate()
            .min_by_key(|(_, worker)| worker.sessions);
        let (worker, _) = idlest.expect("an engine has at least one worker");
        self.all[worker].sessions += 1;
        worker
    }

    /// A worker has one session less.
    pub(super) fn disengage(&mut self, worker: usize) {
        self.all[worker].sessions -= 1;
    }

    /// Gives a worker an order.
    pub(super) fn tell(&self, worker: usize, command: Command) {
        self.all[worker].tell(command);
    }

    /// Moves one idle session from the worker with most to the one with fewest, if that evens
    /// them out; its name and where it is now.
    pub(super) fn even_out(&mut self) -> Option<(String, usize)> {
        let by_sessions = |(_, worker): &(usize, &WorkerHandle)| worker.sessions;
        let (from, most) = self.all.iter().enumerate().max_by_key(by_sessions)?;
        let (to, fewest) = self.all.iter().enumerate().min_by_key(by_sessions)?;
        if most.sessions < fewest.sessions + 2 {
            return None;
        }
        let (taker, taken) = crossbeam_channel::bounded(1);
        most.tell(Command::GiveAway { taker });
        // A worker's turn is short, and one that has ended answers by its end.
        let moving: Moving = taken.recv().ok()??;
        let name = moving.name.clone();
        fewest.tell(Command::Take(moving));
        self.all[from].sessions -= 1;
        self.all[to].sessions += 1;
        Some((name, to))
    }

    /// Takes away every session that has memory, whatever is under way for it. Those of a worker
    /// that doesn't come to it before the deadline stay.
    pub(super) fn take_all(&self, deadline: Instant) -> Vec<Moving> {
        let (taker, taken) = crossbeam_channel::bounded(self.all.len());
        let told = |worker: &&WorkerHandle| {
            let taker = taker.clone();
            worker.tell_before(deadline, Command::GiveAllAway { taker })
        };
        let told = self.all.iter().filter(told).count();
        // One that has ended answers by its end.
        drop(taker);
        let mut all = Vec::new();
        let mut answered = 0;
        while answered < told
            && let Ok(moving) = taken.recv_deadline(deadline)
        {
            all.extend(moving);
            answered += 1;
        }
        if answered < self.all.len() {
            let stuck = self.all.len() - answered;
            tracing::error!(stuck, "Workers don't let go of their sessions");
        }
        all
    }

    /// Ends all of them without waiting.
    pub(super) fn leave(self) {
        let now = Instant::now();
        for worker in &self.all {
            worker.tell_before(now, Command::Stop);
        }
    }

    /// Ends all of them, and waits until they have.
    pub(super) fn stop(self) {
        for worker in &self.all {
            worker.tell(Command::Stop);
        }
        for worker in self.all {
            let _ = worker.thread.join();
        }
    }
}

fn start_workers(options: &EngineOptions, outbox: &Outbox) -> io::Result<Vec<WorkerHandle>> {
    let placements: Vec<Option<usize>> = if options.cpus.is_empty() {
        vec![None]
    } else {
        options.cpus.iter().copied().map(Some).collect()
    };
    let (started, outcome) = crossbeam_channel::bounded(placements.len());
    let mut workers = Vec::with_capacity(placements.len());
    for cpu in placements {
        let (inbox, commands) = crossbeam_channel::bounded(256);
        let bell = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?);
        let (their_bell, outbox, worker_options, started) = (
            bell.clone(),
            outbox.clone(),
            options.worker,
            started.clone(),
        );
        let name = cpu.map_or_else(|| "worker".to_owned(), |cpu| format!("worker-{cpu}"));
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let made = pin(cpu)
                .and_then(|()| Worker::new(commands, their_bell, outbox, worker_options, cpu));
            match made {
                Ok(mut worker) => {
                    let _ = started.send(Ok(()));
                    if let Err(error) = worker.run() {
                        // The daemon holds every userfaultfd and starts a successor.
                        tracing::error!(%error, "A worker can't go on");
                        std::process::exit(1);
                    }
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            }
        })?;
        workers.push(WorkerHandle {
            inbox,
            bell,
            sessions: 0,
            thread,
        });
    }
    for _ in &workers {
        outcome.recv().map_err(io::Error::other)??;
    }
    Ok(workers)
}

pub(crate) fn pin(cpu: Option<usize>) -> io::Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}
