//! The connection over which one VMM asks for pages. A request is looked at until it is answered, and
//! taken then.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{MsgFlags, recv, send};

use super::requests::{HEADER_BYTES, REQUEST_BYTES};
use crate::sys::fdpass;

/// What a VMM is told of its request; as the protocol has it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// Its pages are there.
    Ok = 1,
    /// They can't be had.
    Error = 2,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Connection(OwnedFd);

impl Connection {
    /// Whoever had it before may have looked at requests that it has not answered.
    ///
    /// # Errors
    /// It is no Unix socket.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        fdpass::look_from_start(socket.as_fd())?;
        Ok(Self(socket))
    }

    /// Looks at what has come since the last look; no bytes when the VMM asks for nothing any more.
    pub(super) fn look(&self, room: &mut [u8]) -> nix::Result<usize> {
        let looking = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        recv(self.0.as_raw_fd(), room, looking)
    }

    /// Takes the oldest request, which has been answered.
    pub(super) fn take_request(&self) -> io::Result<()> {
        let mut request = [0; REQUEST_BYTES];
        let taken = recv(self.0.as_raw_fd(), &mut request, MsgFlags::MSG_DONTWAIT)?;
        if taken == REQUEST_BYTES {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{taken} bytes of a page request are left"),
        ))
    }

    /// Answers the oldest request; an error also when the VMM doesn't read its answers.
    pub(super) fn respond(&self, answer: Answer) -> io::Result<()> {
        let mut response = [0u8; HEADER_BYTES];
        response[..2].copy_from_slice(&(answer as u16).to_le_bytes());
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.0.as_raw_fd(), &response, flags) {
            Ok(HEADER_BYTES) => Ok(()),
            Ok(_) | Err(nix::Error::EAGAIN) => Err(io::Error::new(
                io::ErrorKind::WriteZero,
                "the VMM does not read the answers to its page requests",
            )),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether nobody is at the other end any more.
pub(super) fn is_hang_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionReset)
}
