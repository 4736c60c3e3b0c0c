//! The requests that are under way to one sandbox's guest.
//!
//! A pause waits a bounded time for them, then closes what is left: their connections lead to an
//! address that another guest may have next. Each has its own connection, so none can outlive what
//! is counted here.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

/// All of one sandbox's; clones are the same.
#[derive(Clone, Debug)]
pub struct Connections {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    open: watch::Sender<usize>,
    /// How often all were closed.
    closings: watch::Sender<u64>,
}

/// One of them, for as long as this is kept.
#[derive(Debug)]
pub struct Connection {
    all: Connections,
    closings: watch::Receiver<u64>,
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            inner: Arc::new(Inner {
                open: watch::Sender::new(0),
                closings: watch::Sender::new(0),
            }),
        }
    }
}

impl Connections {
    /// Counts one more.
    #[must_use]
    pub fn open(&self) -> Connection {
        self.inner.open.send_modify(|open| *open += 1);
        Connection {
            all: self.clone(),
            closings: self.inner.closings.subscribe(),
        }
    }

    /// Waits until there is none, at most for `patience`; then has those that are left closed.
    /// Gives how many those are.
    pub async fn drain(&self, patience: Duration) -> usize {
        let mut open = self.inner.open.subscribe();
        let none = open.wait_for(|open| *open == 0);
        if let Ok(Ok(_)) = tokio::time::timeout(patience, none).await {
            return 0;
        }
        let left = *self.inner.open.borrow();
        self.inner.closings.send_modify(|closings| *closings += 1);
        left
    }
}

impl Connection {
    /// Waits until it has to be closed.
    pub async fn closed(&mut self) {
        // The sender lives as long as this does.
        let _ = self.closings.changed().await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.all.inner.open.send_modify(|open| *open -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn nothing_is_waited_for_when_nothing_is_open() {
        let connections = Connections::default();
        drop(connections.open());
        assert_eq!(connections.drain(Duration::ZERO).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_ends_in_time_is_not_closed() {
        let connections = Connections::default();
        let mut one = connections.open();
        let using = tokio::spawn(async move {
            tokio::select! {
                () = one.closed() => false,
                () = tokio::time::sleep(LONG / 2) => true,
            }
        });
        assert_eq!(connections.drain(LONG).await, 0);
        assert!(using.await.unwrap(), "it was closed");
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_end_is_closed_and_later_ones_are_not() {
        let connections = Connections::default();
        let mut old = [connections.open(), connections.open()];
        assert_eq!(connections.drain(LONG).await, 2);
        for old in &mut old {
            old.closed().await;
        }
        let mut new = connections.open();
        let closed = tokio::time::timeout(LONG, new.closed()).await;
        assert!(closed.is_err(), "a new one was closed");
    }
}
