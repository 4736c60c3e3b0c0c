//! Who listens to a process: any number of bounded queues, the fullest of which sets the pace.

use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;

/// Events that wait for one client before the process's output is held back.
const QUEUE: usize = 16;

/// What a listener is told.
#[derive(Debug, Clone)]
pub(super) enum Event {
    /// The process wrote to its standard output.
    Stdout(Bytes),
    /// The process wrote to its standard error.
    Stderr(Bytes),
    /// The process wrote to its terminal.
    Terminal(Bytes),
    /// The process ended; always the last.
    End(Ending),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ending {
    pub(super) status: ExitStatus,
    /// Whether its deadline, and so our signal, ended it.
    pub(super) timed_out: bool,
}

/// The listeners of one process, until it has ended.
#[derive(Debug, Default)]
pub(super) struct Audience(Mutex<Seats>);

#[derive(Debug, Default)]
struct Seats {
    listeners: Vec<mpsc::Sender<Event>>,
    closed: bool,
}

impl Audience {
    /// Listens from now on; `None` when the end has been told already.
    pub(super) fn join(&self) -> Option<mpsc::Receiver<Event>> {
        let mut seats = self.lock();
        if seats.closed {
            return None;
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        seats.listeners.push(sender);
        Some(receiver)
    }

    /// Tells everyone, waiting for those whose queue is full; forgets those who have left.
    pub(super) async fn tell(&self, event: Event) {
        // A copy, because the lock isn't held while waiting.
        let listeners = self.lock().listeners.clone();
        for listener in &listeners {
            // An error means that this listener has left, which is noticed below.
            let _ = listener.send(event.clone()).await;
        }
        self.lock()
            .listeners
            .retain(|listener| !listener.is_closed());
    }

    /// Tells everyone the end; nobody can join afterwards.
    pub(super) async fn close(&self, ending: Ending) {
        let listeners = {
            let mut seats = self.lock();
            seats.closed = true;
            std::mem::take(&mut seats.listeners)
        };
        for listener in listeners {
            let _ = listener.send(Event::End(ending)).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    fn chunk() -> Event {
        Event::Stdout(Bytes::from_static(b"x"))
    }

    #[tokio::test(start_paused = true)]
    async fn full_queue_holds_the_teller_back_until_its_listener_leaves() {
        let audience = Audience::default();
        let listener = audience.join().unwrap();
        for _ in 0..QUEUE {
            audience.tell(chunk()).await;
        }
        let second = std::time::Duration::from_secs(1);
        assert!(
            tokio::time::timeout(second, audience.tell(chunk()))
                .await
                .is_err(),
            "held back"
        );
        drop(listener);
        audience.tell(chunk()).await;
        assert!(audience.lock().listeners.is_empty(), "nobody is left");
    }

    #[tokio::test]
    async fn end_is_told_to_everyone_once_and_closes_the_door() {
        let audience = Audience::default();
        let (mut first, mut second) = (audience.join().unwrap(), audience.join().unwrap());
        let ending = Ending {
            status: ExitStatus::from_raw(0),
            timed_out: false,
        };
        audience.close(ending).await;
        for listener in [&mut first, &mut second] {
            assert!(matches!(listener.recv().await, Some(Event::End(told)) if told == ending));
            assert!(listener.recv().await.is_none());
        }
        assert!(audience.join().is_none());
    }
}
