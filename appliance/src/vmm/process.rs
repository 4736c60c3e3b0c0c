//! A VMM's process: started through the launcher, watched and killed by pidfd.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use uffd_engine::control;
use uffd_engine::sys::process::{pidfd_open, pidfd_signal};

use super::console::Console;
use super::exit::Exit;
use super::launch::{self, Launch, LaunchFailure};
use crate::sys::readiness::Readable;

/// A running VMM process. Dropping it kills the process.
#[derive(Debug)]
pub struct VmmProcess {
    child: Child,
    pidfd: OwnedFd,
    console: Console,
}

impl VmmProcess {
    /// Starts a launcher and has it become the VMM.
    ///
    /// # Errors
    /// Which step failed; no process is left.
    pub async fn start(launch: &Launch, fds: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let (reader, writer) = io::pipe()?;
        let child = Command::new("/proc/self/exe")
            .arg("launch")
            .stdin(theirs)
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()?;
        let pidfd = pidfd_open(child.id() as i32)?;
        let reader = tokio::net::unix::pipe::Receiver::from_owned_fd(reader.into())?;
        let process = Self {
            child,
            pidfd,
            console: Console::record(reader),
        };
        launch::send(ours.as_fd(), launch, fds)?;
        set_nonblocking(&ours)?;
        match Readable::new(ours)?
            .read(control::receive::<LaunchFailure>)
            .await
        {
            // The socket closed on exec.
            Ok(None) => Ok(process),
            Ok(Some((failure, _))) => Err(io::Error::other(failure.reason)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(process),
            Err(error) => Err(error),
        }
    }

    /// What it prints.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// How it ended, if it has.
    pub fn exit(&mut self) -> Option<Exit> {
        let status = self.child.try_wait().ok()??;
        Some(Exit::of(status, &self.console.text()))
    }

    /// Waits until it has ended, or can't be watched any longer.
    pub async fn ended(&self) {
        if let Ok(pidfd) = self.pidfd.try_clone().and_then(Readable::new) {
            let _ = pidfd.wait().await;
        }
    }

    /// Its process id, for people and logs only.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Ends it and waits until it has.
    pub async fn kill(&mut self) {
        let _ = pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL);
        self.ended().await;
        let _ = self.child.wait();
    }
}

impl AsFd for VmmProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        let _ = pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL);
        let _ = self.child.wait();
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
