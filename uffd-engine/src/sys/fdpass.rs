//! Messages with descriptors over Unix sockets (`SCM_RIGHTS`), and who sent them.
#![expect(unsafe_code, reason = "a received descriptor arrives as a bare number")]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, accept4, getsockopt, recvmsg, sendmsg,
    sockopt,
};

/// The most descriptors one message may carry here; more are refused by closing
/// them all (a sender that does this is not one of ours).
pub const MAX_FDS: usize = 8;

/// One received message.
#[derive(Debug)]
pub struct Received {
    /// Bytes of the message, at the start of the caller's buffer.
    pub len: usize,
    /// Descriptors that came with it, all close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// The message or its descriptors did not fit and were cut.
    pub truncated: bool,
}

/// Sends `bytes` and `fds` as one message.
///
/// # Errors
/// As `sendmsg(2)`; on a stream socket a short write is `WriteZero`.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent != bytes.len() {
        return Err(io::Error::new(
            io::ErrorKind::WriteZero,
            "the message was cut short",
        ));
    }
    Ok(())
}

/// Receives one message (or what is there of a stream). `len == 0` with no
/// descriptors is the peer's end.
///
/// # Errors
/// As `recvmsg(2)`.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            for fd in raw {
                // SAFETY: the kernel just installed this descriptor for us and nobody
                // else in the process knows its number.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
    Ok(Received {
        len: message.bytes,
        fds,
        truncated: message.flags.intersects(cut),
    })
}

/// From now on, what is looked at (`MSG_PEEK`) goes on where the last look ended, from the first
/// byte that nobody has taken.
///
/// # Errors
/// As `setsockopt(2)`: only Unix sockets do this everywhere.
pub fn look_from_start(socket: BorrowedFd<'_>) -> io::Result<()> {
    let offset: libc::c_int = 0;
    // SAFETY: the option's value is one `int`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Accepts one connection, non-blocking and close-on-exec.
///
/// # Errors
/// As `accept4(2)`.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let raw = accept4(
        listener.as_raw_fd(),
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// The process at the other end of a connected Unix socket, as the kernel recorded
/// it at connect time.
///
/// # Errors
/// As `getsockopt(2)`.
pub fn peer_pid(socket: BorrowedFd<'_>) -> io::Result<i32> {
    Ok(getsockopt(&socket.as_fd(), sockopt::PeerCredentials)?.pid())
}
