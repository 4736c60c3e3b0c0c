//! QMP, QEMU's control protocol: JSON lines over a Unix socket, one command at a time.
//!
//! Source: QEMU `docs/interop/qmp-spec.rst`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use uffd_engine::sys::fdpass;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU answered with an error.
    #[error("{0}")]
    Refused(String),
    /// QEMU closed the connection: it has ended.
    #[error("QEMU closed its control socket")]
    Closed,
    /// The socket failed, or what came was no QMP.
    #[error("The control socket failed")]
    Io(#[source] io::Error),
}

impl From<io::Error> for QmpError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A connection to one QEMU. Events that arrive while a command is answered are kept.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    events: Vec<Value>,
}

impl Qmp {
    /// Waits for the greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// QEMU ended, or is no QEMU.
    pub async fn greet(stream: UnixStream) -> Result<Self, QmpError> {
        let (reader, writer) = stream.into_split();
        let mut qmp = Self {
            reader: BufReader::new(reader),
            writer,
            events: Vec::new(),
        };
        qmp.read().await?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command and returns its result.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, &[]).await
    }

    /// Runs a command that comes with descriptors (`getfd`).
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, QmpError> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        let stream: &UnixStream = self.writer.as_ref();
        stream.writable().await?;
        stream.try_io(Interest::WRITABLE, || {
            fdpass::send(stream.as_fd(), line.as_bytes(), fds)
        })?;
        loop {
            let message = self.read().await?;
            if let Some(error) = message.get("error") {
                let text = error["desc"].as_str().unwrap_or("no description");
                return Err(QmpError::Refused(text.to_owned()));
            }
            if let Some(result) = message.get("return") {
                return Ok(result.clone());
            }
            if message.get("event").is_some() {
                self.events.push(message);
            }
        }
    }

    /// Waits for an event of this name for which `wanted` holds, dropping others.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn wait_for(
        &mut self,
        event: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, QmpError> {
        let matches = |message: &Value| message["event"] == event && wanted(&message["data"]);
        for message in std::mem::take(&mut self.events) {
            if matches(&message) {
                return Ok(message["data"].clone());
            }
        }
        loop {
            let message = self.read().await?;
            if matches(&message) {
                return Ok(message["data"].clone());
            }
        }
    }

    async fn read(&mut self) -> Result<Value, QmpError> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).await? == 0 {
            return Err(QmpError::Closed);
        }
        serde_json::from_str(&line).map_err(|error| QmpError::Io(error.into()))
    }
}
