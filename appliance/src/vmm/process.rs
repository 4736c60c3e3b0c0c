//! A VMM's process: started through the launcher, watched and killed by pidfd.
//!
//! One that was started ahead belongs to no runtime until somebody needs it: [`Started`] has a pipe
//! where [`VmmProcess`] has a console.

use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use uffd_engine::control;
use uffd_engine::sys::process::{pidfd_open, pidfd_signal};

use super::cgroup::Cgroup;
use super::console::Console;
use super::exit::Exit;
use super::launch::{self, Launch, LaunchFailure};
use crate::sys::readiness::Readable;

/// A child that doesn't outlive this.
#[derive(Debug)]
struct Held {
    child: Child,
    pidfd: OwnedFd,
    cgroup: Option<Cgroup>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL);
        let _ = self.child.wait();
        if let Some(cgroup) = &self.cgroup {
            cgroup.remove();
        }
    }
}

/// A VMM process that no runtime watches yet. Dropping it kills the process.
#[derive(Debug)]
pub struct Started {
    held: Held,
    output: PipeReader,
}

impl Started {
    /// Starts a launcher and has it become the VMM.
    ///
    /// # Errors
    /// Which step failed; no process is left.
    pub async fn start(launch: &Launch, fds: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let (output, writer) = io::pipe()?;
        let child = Command::new("/proc/self/exe")
            .arg("launch")
            .stdin(theirs)
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()?;
        let pidfd = pidfd_open(child.id() as i32)?;
        let held = Held {
            child,
            pidfd,
            cgroup: launch.cgroup.clone(),
        };
        launch::send(ours.as_fd(), launch, fds)?;
        set_nonblocking(&ours)?;
        match Readable::new(ours)?
            .read(control::receive::<LaunchFailure>)
            .await
        {
            // The socket closed on exec.
            Ok(None) => Ok(Self { held, output }),
            Ok(Some((failure, _))) => Err(io::Error::other(failure.reason)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                Ok(Self { held, output })
            }
            Err(error) => Err(error),
        }
    }

    /// Has the calling runtime record what it prints, and has printed.
    ///
    /// # Errors
    /// The runtime can't; no process is left.
    pub fn watch(self) -> io::Result<VmmProcess> {
        let output = tokio::net::unix::pipe::Receiver::from_owned_fd(self.output.into())?;
        Ok(VmmProcess {
            held: self.held,
            console: Console::record(output),
        })
    }
}

impl AsFd for Started {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.pidfd.as_fd()
    }
}

/// A running VMM process. Dropping it kills the process.
#[derive(Debug)]
pub struct VmmProcess {
    held: Held,
    console: Console,
}

impl VmmProcess {
    /// Starts a launcher and has it become the VMM.
    ///
    /// # Errors
    /// Which step failed; no process is left.
    pub async fn start(launch: &Launch, fds: &[BorrowedFd<'_>]) -> io::Result<Self> {
        Started::start(launch, fds).await?.watch()
    }

    /// What it prints.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// How it ended, if it has.
    pub fn exit(&mut self) -> Option<Exit> {
        let status = self.held.child.try_wait().ok()??;
        let oom_kills = self.cgroup().map_or(0, Cgroup::oom_kills);
        Some(Exit::of(status, &self.console.text(), oom_kills > 0))
    }

    /// The control group that it is in.
    #[must_use]
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.held.cgroup.as_ref()
    }

    /// Waits until it has ended, or can't be watched any longer.
    pub async fn ended(&self) {
        ended(self.as_fd()).await;
    }

    /// Its process id, for people and logs only.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.held.child.id() as i32
    }

    /// Ends it and waits until it has.
    pub async fn kill(&mut self) {
        let _ = pidfd_signal(self.held.pidfd.as_fd(), libc::SIGKILL);
        self.ended().await;
        let _ = self.held.child.wait();
    }
}

impl AsFd for VmmProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.pidfd.as_fd()
    }
}

/// Waits until the process behind a pidfd has ended, or can't be watched any longer.
pub async fn ended(pidfd: BorrowedFd<'_>) {
    if let Ok(pidfd) = pidfd.try_clone_to_owned().and_then(Readable::new) {
        let _ = pidfd.wait().await;
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
