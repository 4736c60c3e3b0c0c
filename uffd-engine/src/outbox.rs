//! What an engine's threads have to say to the daemon. Rare, and never on the fault
//! path; without a daemon connected, reports are dropped: a new daemon asks anew.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::control::{self, Report};

/// The sending half of the control connection, shared by all threads of an engine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outbox {
    connection: Arc<Mutex<Option<OwnedFd>>>,
}

impl Outbox {
    /// Sends to this connection from now on.
    pub(crate) fn connect(&self, connection: OwnedFd) {
        *self.connection.lock() = Some(connection);
    }

    /// The daemon has gone.
    pub(crate) fn disconnect(&self) {
        *self.connection.lock() = None;
    }

    /// Sends a report if a daemon is there.
    pub(crate) fn send(&self, report: &Report, fds: &[BorrowedFd<'_>]) {
        if let Some(connection) = &*self.connection.lock()
            && let Err(error) = control::send(connection.as_fd(), report, fds)
        {
            // One that has gone is told nothing, and will ask anew.
            match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    tracing::debug!(%error, ?report, "The daemon has gone");
                }
                _ => tracing::warn!(%error, ?report, "The daemon can't be told"),
            }
        }
    }
}
