//! A VMM that is started and opens its API on a socket; no runtime watches it yet.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::VmmError;
use super::api::{ApiFault, finish, judge};
use super::appearing::Appearing;
use super::launch::Launch;
use super::process::{Started, ended};

/// A process whose API is open.
#[derive(Debug)]
pub(crate) struct Open {
    /// The process.
    pub(crate) process: Started,
    /// A connection to its API.
    pub(crate) api: UnixStream,
    /// From the start of the program.
    pub(crate) took: Duration,
}

/// Starts a VMM and waits until it listens at this socket, whose directory is there.
///
/// # Errors
/// It has ended, or takes longer than `patience`; no process is left.
pub(crate) async fn open(
    name: &str,
    (launch, fds): (&Launch, &[BorrowedFd<'_>]),
    socket: &Path,
    patience: Duration,
) -> Result<Open, VmmError> {
    let failed = |source| VmmError::Start {
        name: name.to_owned(),
        source,
    };
    let _ = fs::remove_file(socket);
    let appearing = Appearing::new(socket).map_err(failed)?;
    let process = Started::start(launch, fds).await.map_err(failed)?;
    let started = Instant::now();
    let connecting = async {
        tokio::select! {
            connected = appearing.connect() => {
                connected.and_then(tokio::net::UnixStream::into_std).map_err(ApiFault::Io)
            }
            () = ended(process.as_fd()) => Err(io::Error::from(io::ErrorKind::BrokenPipe).into()),
        }
    };
    match finish(name, "opening its API", patience, connecting).await {
        Ok(api) => Ok(Open {
            process,
            api,
            took: started.elapsed(),
        }),
        Err(error) => {
            let mut process = process.watch().map_err(failed)?;
            judge(name, &mut process, Err(error)).await
        }
    }
}
