//! Firecracker's API: HTTP over its Unix socket, one request at a time.
//!
//! The socket is waited for, not asked for again and again. A connection on which anything went
//! wrong is dropped and the next request makes its own: an answer that comes late must not be
//! taken for another's.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::sys::readiness::Readable;

/// No answer of Firecracker's is larger.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Why a request was not met.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiFault {
    /// Firecracker says no, and why.
    #[error("{0}")]
    Refused(String),
    /// No whole answer came.
    #[error("The API socket failed")]
    Io(#[source] io::Error),
}

impl From<io::Error> for ApiFault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

/// Notices when a socket appears in a directory.
pub(super) struct Appearing {
    watch: Readable,
    inotify: Inotify,
    socket: PathBuf,
}

impl Appearing {
    /// To be made before whoever makes the socket is started.
    pub(super) fn new(socket: &Path) -> io::Result<Self> {
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
    pub(super) async fn connect(self) -> io::Result<std::os::unix::net::UnixStream> {
        loop {
            // It is made before anybody listens: what connects to it in between is refused, and
            // the next event may be none of its.
            match UnixStream::connect(&self.socket).await {
                Ok(stream) => {
                    self.let_go();
                    return stream.into_std();
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

/// One Firecracker's API.
#[derive(Debug)]
pub(super) struct Api {
    socket: PathBuf,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Api {
    /// Over a connection to this socket, on the calling runtime.
    pub(super) async fn new(
        socket: PathBuf,
        stream: std::os::unix::net::UnixStream,
    ) -> io::Result<Self> {
        let sender = Some(Self::over(UnixStream::from_std(stream)?).await?);
        Ok(Self { socket, sender })
    }

    async fn over(stream: UnixStream) -> io::Result<SendRequest<Full<Bytes>>> {
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // It ends with the sender, or with Firecracker; requests report what happened.
        tokio::spawn(connection);
        Ok(sender)
    }

    /// `PUT`s a body.
    pub(super) async fn put(&mut self, path: &str, body: &impl Serialize) -> Result<(), ApiFault> {
        self.send(Method::PUT, path, body).await
    }

    /// `PATCH`es with a body.
    pub(super) async fn patch(
        &mut self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<(), ApiFault> {
        self.send(Method::PATCH, path, body).await
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<(), ApiFault> {
        let body = serde_json::to_vec(body).map_err(io::Error::other)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Accept", "application/json")
            .header("Content-Type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(io::Error::other)?;
        // Taken out for as long as it is in use: a request that is given up takes it along.
        let mut sender = match self.sender.take().filter(|sender| !sender.is_closed()) {
            Some(sender) => sender,
            None => Self::over(UnixStream::connect(&self.socket).await?).await?,
        };
        sender.ready().await.map_err(io::Error::other)?;
        let answer = sender
            .send_request(request)
            .await
            .map_err(io::Error::other)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES)
            .collect()
            .await
            .map_err(io::Error::other)?;
        self.sender = Some(sender);
        if status.is_success() {
            return Ok(());
        }
        let body = body.to_bytes();
        let said = serde_json::from_slice::<Fault>(&body).map_or_else(
            |_| String::from_utf8_lossy(&body).into_owned(),
            |fault| fault.fault_message,
        );
        Err(ApiFault::Refused(format!("{} ({status})", said.trim())))
    }
}
