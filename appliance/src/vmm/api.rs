//! A VMM's API: HTTP over its Unix socket, one request at a time; and its failures by their names.
//!
//! A connection on which anything went wrong is dropped and the next request makes its own: an
//! answer that comes late must not be taken for another's.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::VmmError;
use super::process::VmmProcess;

/// No answer is larger.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Why a request was not met.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiFault {
    /// The VMM says no, and why.
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

/// What refusals look like.
#[derive(Deserialize)]
#[serde(untagged)]
enum Fault {
    /// Firecracker's.
    Message { fault_message: String },
    /// Cloud Hypervisor's: an error and its causes.
    Chain(Vec<String>),
}

/// One VMM's API.
#[derive(Debug)]
pub(crate) struct Api {
    socket: PathBuf,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Api {
    /// Over a connection to this socket, on the calling runtime.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub(crate) async fn new(
        socket: PathBuf,
        stream: std::os::unix::net::UnixStream,
    ) -> io::Result<Self> {
        let sender = Some(Self::over(UnixStream::from_std(stream)?).await?);
        Ok(Self { socket, sender })
    }

    /// At this socket, to be connected to at the first request.
    pub(crate) const fn at(socket: PathBuf) -> Self {
        Self {
            socket,
            sender: None,
        }
    }

    /// Another connection to the same one, for a request that is answered late.
    pub(crate) fn beside(&self) -> Self {
        Self::at(self.socket.clone())
    }

    async fn over(stream: UnixStream) -> io::Result<SendRequest<Full<Bytes>>> {
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // It ends with the sender, or with the VMM; requests report what happened.
        tokio::spawn(connection);
        Ok(sender)
    }

    /// `GET`s what is there.
    pub(crate) async fn get(&mut self, path: &str) -> Result<Bytes, ApiFault> {
        self.send(Method::GET, path, Vec::new()).await
    }

    /// `PUT`s nothing: an order.
    pub(crate) async fn order(&mut self, path: &str) -> Result<(), ApiFault> {
        self.send(Method::PUT, path, Vec::new()).await.map(|_| ())
    }

    /// `PUT`s a body.
    pub(crate) async fn put(&mut self, path: &str, body: &impl Serialize) -> Result<(), ApiFault> {
        let body = serde_json::to_vec(body).map_err(io::Error::other)?;
        self.send(Method::PUT, path, body).await.map(|_| ())
    }

    /// `PATCH`es with a body.
    pub(crate) async fn patch(
        &mut self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<(), ApiFault> {
        let body = serde_json::to_vec(body).map_err(io::Error::other)?;
        self.send(Method::PATCH, path, body).await.map(|_| ())
    }

    async fn send(&mut self, method: Method, path: &str, body: Vec<u8>) -> Result<Bytes, ApiFault> {
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
        let body = body.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        Err(ApiFault::Refused(format!("{} ({status})", said_in(&body))))
    }
}

fn said_in(refusal: &[u8]) -> String {
    let said = match serde_json::from_slice(refusal) {
        Ok(Fault::Message { fault_message }) => fault_message,
        Ok(Fault::Chain(causes)) => causes.join(": "),
        Err(_) => String::from_utf8_lossy(refusal).into_owned(),
    };
    said.trim().to_owned()
}

/// Bounds an exchange and gives its failure a name.
pub(crate) async fn finish<T>(
    name: &str,
    command: &str,
    patience: Duration,
    exchange: impl Future<Output = Result<T, ApiFault>>,
) -> Result<T, VmmError> {
    let (name, command) = (name.to_owned(), command.to_owned());
    match timeout(patience, exchange).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(ApiFault::Refused(answer))) => Err(VmmError::Refused {
            name,
            command,
            answer,
        }),
        Ok(Err(ApiFault::Io(source))) => Err(VmmError::Io {
            name,
            command,
            source,
        }),
        Err(_) => Err(VmmError::Timeout {
            name,
            command,
            seconds: patience.as_secs(),
        }),
    }
}

/// A broken connection may be all that is seen of a process that ended.
pub(crate) async fn judge<T>(
    name: &str,
    process: &mut VmmProcess,
    done: Result<T, VmmError>,
) -> Result<T, VmmError> {
    const UNTIL_IT_IS_REAPED: Duration = Duration::from_millis(50);
    if !matches!(done, Err(VmmError::Io { .. })) {
        return done;
    }
    if timeout(UNTIL_IT_IS_REAPED, process.ended()).await.is_err() {
        return done;
    }
    process.console().ended(UNTIL_IT_IS_REAPED).await;
    let how = process.exit().map(|exit| format!("{exit}; "));
    Err(VmmError::Ended {
        name: name.to_owned(),
        console: how.unwrap_or_default() + &process.console().tail(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_all_vmms_are_understood() {
        assert_eq!(said_in(b"{\"fault_message\":\"No.\\n\"}"), "No.");
        assert_eq!(said_in(b"[\"No\",\"because\"]"), "No: because");
        assert_eq!(said_in(b" plainly no\n"), "plainly no");
    }
}
