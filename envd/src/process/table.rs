//! The processes that run now, and the task that sees each of them to its end.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::signal::Signal;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::audience::{Audience, Ending, Event};
use super::children::Children;
use super::input::Input;
use super::launch::Launch;
use super::output;
use super::streams::{self, Streams};
use crate::caller::reached;
use crate::proto::process::ProcessConfig;
use crate::{open_files, sys};

/// All running processes; a handle that is cheap to copy.
#[derive(Debug, Clone, Default)]
pub(crate) struct Processes(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    children: Children,
    running: Mutex<BTreeMap<u32, Arc<Running>>>,
    /// Counts processes that were started.
    started: watch::Sender<u64>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) pid: u32,
    pub(super) tag: Option<String>,
    pub(super) config: ProcessConfig,
    pub(super) input: Input,
    pub(super) audience: Arc<Audience>,
}

/// What to start, beyond the launch itself.
pub(super) struct Order {
    pub(super) launch: Launch,
    pub(super) config: ProcessConfig,
    pub(super) tag: Option<String>,
    pub(super) streams: Streams,
    /// The control group that it joins.
    pub(super) group: Option<Arc<OwnedFd>>,
    /// When the process group is killed.
    pub(super) deadline: Option<Instant>,
}

/// Why nothing was started.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// The tag is taken.
    #[error("A running process already has the tag {0:?}")]
    TagTaken(String),
    /// Fork, one of the steps after it, or exec failed.
    #[error("Starting {program:?}: {source}")]
    Launch { program: String, source: io::Error },
}

impl Processes {
    /// Starts a process; the receiver hears everything from its first byte on.
    pub(super) fn start(
        &self,
        order: Order,
    ) -> Result<(Arc<Running>, mpsc::Receiver<Event>), StartError> {
        // Held until the process is in the table, so that a tag can't be taken twice.
        let mut running = self.lock();
        if let Some(tag) = order.tag.as_ref().filter(|tag| has_tag(&running, tag)) {
            return Err(StartError::TagTaken(tag.clone()));
        }
        let program = order.launch.program.clone();
        let failed = |source| StartError::Launch { program, source };
        let (process, heard) = self.launch(order).map_err(failed)?;
        running.insert(process.pid, Arc::clone(&process));
        self.0.started.send_modify(|count| *count += 1);
        Ok((process, heard))
    }

    fn launch(&self, order: Order) -> io::Result<(Arc<Running>, mpsc::Receiver<Event>)> {
        let (mut command, terminal) = command(&order)?;
        let (child, exit) = self.0.children.spawn(&mut command)?;
        // With it go our copies of the child's side, without which its end would not be seen.
        drop(command);
        let pid = child.id();
        self.supervise(child, terminal, exit, order)
            .inspect_err(|_| {
                // Nobody would ever hear of it; it is ours and unreaped, or gone, which is as good.
                let _ = self.0.children.signal_group(pid, Signal::SIGKILL);
            })
    }

    fn supervise(
        &self,
        mut child: Child,
        terminal: Option<OwnedFd>,
        exit: oneshot::Receiver<ExitStatus>,
        order: Order,
    ) -> io::Result<(Arc<Running>, mpsc::Receiver<Event>)> {
        let audience = Arc::new(Audience::default());
        let heard = audience.join();
        let (ended, ended_seen) = watch::channel(false);
        let ends = streams::ends(&mut child, terminal)?;
        let process = Arc::new(Running {
            pid: child.id(),
            tag: order.tag,
            config: order.config,
            input: Input::new(ends.input, ends.terminal),
            audience,
        });
        let follow = |(pipe, label)| {
            output::follow(pipe, label, process.audience.clone(), ended_seen.clone())
        };
        let told = ends.outputs.into_iter().map(follow).collect();
        let supervisor = Supervisor {
            processes: self.clone(),
            process: Arc::clone(&process),
            exit,
            ended,
            told,
            deadline: order.deadline,
        };
        tokio::spawn(supervisor.run());
        // A new audience takes everyone.
        let heard = heard.ok_or_else(|| io::Error::other("The audience is closed"))?;
        Ok((process, heard))
    }

    /// The process of that pid.
    pub(super) fn with_pid(&self, pid: u32) -> Option<Arc<Running>> {
        self.lock().get(&pid).cloned()
    }

    /// The process of that tag.
    pub(super) fn with_tag(&self, tag: &str) -> Option<Arc<Running>> {
        self.lock()
            .values()
            .find(|process| process.tag.as_deref() == Some(tag))
            .cloned()
    }

    /// All of them, by pid.
    pub(super) fn all(&self) -> Vec<Arc<Running>> {
        self.lock().values().cloned().collect()
    }

    /// Resolves when a process is started after this call.
    pub(crate) fn next_start(&self) -> impl Future<Output = ()> + use<> {
        let mut started = self.0.started.subscribe();
        async move {
            // An error means that there will be no more.
            let _ = started.changed().await;
        }
    }

    /// Signals a process group; `false` when its leader has ended.
    pub(super) fn signal(&self, process: &Running, signal: Signal) -> io::Result<bool> {
        self.0.children.signal_group(process.pid, signal)
    }

    /// Reaps children until the daemon ends.
    pub(crate) async fn reap_for_ever(&self) -> io::Result<()> {
        self.0.children.reap_for_ever().await
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<Running>>> {
        self.0
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_tag(running: &BTreeMap<u32, Arc<Running>>, tag: &str) -> bool {
    running
        .values()
        .any(|process| process.tag.as_deref() == Some(tag))
}

/// The command, and our side of its terminal if it gets one.
fn command(order: &Order) -> io::Result<(Command, Option<OwnedFd>)> {
    let launch = &order.launch;
    let mut command = Command::new(&launch.program);
    command
        .args(&launch.arguments)
        .env_clear()
        .envs(&launch.environment);
    let owner = launch.credentials.as_ref().map(|who| who.uid);
    let terminal = order.streams.attach(&mut command, owner)?;
    let setting = sys::launch::Setting {
        credentials: launch.credentials.clone(),
        directory: CString::new(launch.directory.as_str()).map_err(io::Error::other)?,
        terminal: terminal.is_some(),
        open_files: open_files::inherited(),
        group: order.group.clone(),
    };
    sys::launch::prepare(&mut command, setting);
    Ok((command, terminal))
}

/// Sees one process to its end: deadline, exit, last output, and only then the end event.
struct Supervisor {
    processes: Processes,
    process: Arc<Running>,
    exit: oneshot::Receiver<ExitStatus>,
    ended: watch::Sender<bool>,
    told: Vec<oneshot::Receiver<()>>,
    deadline: Option<Instant>,
}

impl Supervisor {
    async fn run(mut self) {
        let Some(ending) = self.ending().await else {
            return;
        };
        // No receiver is left when both pipes are at their end already.
        let _ = self.ended.send(true);
        for told in self.told {
            let _ = told.await;
        }
        self.processes.lock().remove(&self.process.pid);
        self.process.audience.close(ending).await;
    }

    /// Waits for the exit, and kills the group when the deadline comes first.
    async fn ending(&mut self) -> Option<Ending> {
        tokio::select! {
            biased;
            status = &mut self.exit => {
                return Some(Ending { status: status.ok()?, timed_out: false });
            }
            () = reached(self.deadline) => {}
        }
        if let Err(error) = self.processes.signal(&self.process, Signal::SIGKILL) {
            eprintln!(
                "envd: Killing process group {} at its deadline: {error}",
                self.process.pid
            );
        }
        let status = (&mut self.exit).await.ok()?;
        Some(Ending {
            status,
            timed_out: true,
        })
    }
}
