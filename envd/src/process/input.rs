//! A process's input, pipe or terminal, shared by everyone who writes to it.

use std::os::fd::OwnedFd;

use connectrpc::ConnectError;
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::sync::Mutex;

use super::terminal::Size;
use crate::proto::process::ProcessInput;
use crate::proto::process::process_input::Input as Oneof;

/// The daemon's end. Writers take turns, so what one writes at once stays together.
#[derive(Debug)]
pub(super) struct Input {
    /// `None` once closed, or when none was asked for.
    sender: Mutex<Option<pipe::Sender>>,
    terminal: Option<OwnedFd>,
}

impl Input {
    /// With a terminal, `sender` writes to it.
    pub(super) fn new(sender: Option<pipe::Sender>, terminal: Option<OwnedFd>) -> Input {
        Input {
            sender: Mutex::new(sender),
            terminal,
        }
    }

    /// Writes all of it, waiting while the process doesn't read.
    pub(super) async fn write(&self, input: Option<ProcessInput>) -> Result<(), ConnectError> {
        let bytes = match (input.and_then(|input| input.input), &self.terminal) {
            (Some(Oneof::Stdin(bytes)), None) | (Some(Oneof::Pty(bytes)), Some(_)) => bytes,
            (Some(Oneof::Stdin(_)), Some(_)) => {
                let message = "Field input.stdin: the process has a terminal; use input.pty";
                return Err(ConnectError::failed_precondition(message));
            }
            (Some(Oneof::Pty(_)), None) => {
                let message = "Field input.pty: the process has no terminal; use input.stdin";
                return Err(ConnectError::failed_precondition(message));
            }
            (None, _) => return Err(ConnectError::invalid_argument("Field input is missing")),
        };
        let mut sender = self.sender.lock().await;
        let Some(open) = sender.as_mut() else {
            let message = "Standard input is closed, or was never open";
            return Err(ConnectError::failed_precondition(message));
        };
        if let Err(error) = open.write_all(&bytes).await {
            *sender = None;
            let message = format!("Writing to the process's input: {error}");
            return Err(ConnectError::failed_precondition(message));
        }
        Ok(())
    }

    /// Lets the process read end-of-file; again is fine.
    pub(super) async fn close(&self) -> Result<(), ConnectError> {
        if self.terminal.is_some() {
            let message = "A terminal's input can't be closed; send it the byte 0x04 instead";
            return Err(ConnectError::failed_precondition(message));
        }
        *self.sender.lock().await = None;
        Ok(())
    }

    /// Changes the terminal's size.
    pub(super) fn resize(&self, size: Size) -> Result<(), ConnectError> {
        let Some(terminal) = &self.terminal else {
            let message = "Field pty: the process has no terminal";
            return Err(ConnectError::failed_precondition(message));
        };
        size.apply(terminal)
            .map_err(|e| ConnectError::internal(format!("Resizing the terminal: {e}")))
    }
}
