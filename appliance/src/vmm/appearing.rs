//! Notices when a socket appears in a directory: it is waited for, not asked for again and again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::net::UnixStream;

use crate::sys::readiness::Readable;

/// Waits for one socket.
pub(crate) struct Appearing {
    watch: Readable,
    inotify: Inotify,
    socket: PathBuf,
}

impl Appearing {
    /// To be made before whoever makes the socket is told to.
    ///
    /// # Errors
    /// Its directory is not there, or the host has no watch to give.
    pub(crate) fn new(socket: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let dir = socket.parent().unwrap_or(Path::new("/"));
        inotify.add_watch(dir, AddWatchFlags::IN_CREATE)?;
        let fd: OwnedFd = inotify.as_fd().try_clone_to_owned()?;
        Ok(Self {
            watch: Readable::new(fd)?,
            inotify,
            socket: socket.to_owned(),
        })
    }

    /// The last descriptor of an inotify waits for all that reads its marks, 14 ms on a machine
    /// with two cores; nobody here has to.
    fn let_go(self) {
        let Self { watch, inotify, .. } = self;
        drop(watch);
        tokio::task::spawn_blocking(move || drop(inotify));
    }

    /// Waits until it is there and somebody listens at it.
    ///
    /// # Errors
    /// As `connect(2)`.
    pub(crate) async fn connect(self) -> io::Result<UnixStream> {
        loop {
            // It is made before anybody listens: what connects to it in between is refused, and
            // the next event may be none of its.
            match UnixStream::connect(&self.socket).await {
                Ok(stream) => {
                    self.let_go();
                    return Ok(stream);
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    // A few microseconds; a timer would take a thousand.
                    std::thread::yield_now();
                    tokio::task::yield_now().await;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.watch
                        .read(|_| self.inotify.read_events().map_err(io::Error::from))
                        .await?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}
