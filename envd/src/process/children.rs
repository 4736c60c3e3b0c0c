//! The children of this process: forked, signalled and reaped under one lock.
//!
//! As PID 1 the daemon inherits every orphan, so one reaper waits for *any* child and hands a
//! status to whoever started it; the rest are orphans and forgotten. Forking under the lock means
//! that no exit can be seen before somebody is registered to hear of it; signalling under it means
//! that the pid can't have been reaped, and given to another process, in between.

use std::collections::HashMap;
use std::io;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::sys;

/// Who waits for which pid.
#[derive(Debug, Default)]
pub(super) struct Children(Mutex<HashMap<u32, oneshot::Sender<ExitStatus>>>);

impl Children {
    /// Starts a command; the receiver gets its status once.
    pub(super) fn spawn(
        &self,
        command: &mut Command,
    ) -> io::Result<(Child, oneshot::Receiver<ExitStatus>)> {
        let mut waiting = self.lock();
        let child = command.spawn()?;
        let (sender, receiver) = oneshot::channel();
        waiting.insert(child.id(), sender);
        Ok((child, receiver))
    }

    /// Signals the process group that this child leads; `false` when the child has been reaped.
    pub(super) fn signal_group(&self, pid: u32, signal: Signal) -> io::Result<bool> {
        let waiting = self.lock();
        let Some(leader) = i32::try_from(pid)
            .ok()
            .filter(|_| waiting.contains_key(&pid))
        else {
            return Ok(false);
        };
        killpg(Pid::from_raw(leader), signal)?;
        Ok(true)
    }

    /// Reaps whatever has ended, and again at every SIGCHLD.
    ///
    /// # Errors
    /// When the signal can't be listened for.
    pub(super) async fn reap_for_ever(&self) -> io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        loop {
            self.reap();
            if ended.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn reap(&self) {
        let mut waiting = self.lock();
        while let Some((pid, status)) = sys::wait::reap_any() {
            let waiter = u32::try_from(pid).ok().and_then(|pid| waiting.remove(&pid));
            if let Some(waiter) = waiter {
                // Nobody listening any more is fine: the child is reaped either way.
                let _ = waiter.send(status);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<ExitStatus>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
