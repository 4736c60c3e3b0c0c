//! Waiting for a descriptor to become readable, on tokio's reactor.
#![expect(unsafe_code, reason = "the reactor watches a bare descriptor")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor that can be waited for.
#[derive(Debug)]
pub struct Readable {
    inner: AsyncFd<OwnedFd>,
}

impl Readable {
    /// Takes a descriptor over.
    ///
    /// # Errors
    /// It is of a kind that can't be waited for (a plain file).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an `OwnedFd` is open until it is dropped, always names the same
        // descriptor, and is only dropped together with its registration.
        let inner = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(Self {
            inner: inner.map_err(io::Error::from)?,
        })
    }

    /// Waits until it is readable, then tries `read` until that no longer would block.
    ///
    /// # Errors
    /// What `read` says.
    pub async fn read<T>(&self, read: impl Fn(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        loop {
            let mut ready = self.inner.readable().await?;
            match read(self.inner.get_ref().as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                result => return result,
            }
        }
    }

    /// Waits until it is readable.
    ///
    /// # Errors
    /// The reactor is gone.
    pub async fn wait(&self) -> io::Result<()> {
        self.inner.readable().await.map(|_| ())
    }
}
