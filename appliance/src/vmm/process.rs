//! A VMM's process: started through the launcher, watched and killed by pidfd.
//!
//! One that was started ahead belongs to no runtime until somebody needs it: [`Started`] has a pipe
//! where [`VmmProcess`] has a console.

use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::net::unix::pipe::{OpenOptions, Receiver};
use uffd_engine::control;
use uffd_engine::sys::process::{pidfd_open, pidfd_signal};

use super::cgroup::Cgroup;
use super::console::Console;
use super::exit::Exit;
use super::launch::{self, Launch, LaunchFailure};
use crate::sys::readiness::Readable;
use crate::sys::{pidfd_info, spawn};

/// A process that doesn't outlive this.
#[derive(Debug)]
struct Held {
    pid: i32,
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
    cgroup: Option<Cgroup>,
}

impl Held {
    /// Starts a launcher; in its group, if it has one and the kernel can, so that it need not enter.
    fn launcher(
        cgroup: Option<Cgroup>,
        input: OwnedFd,
        output: PipeWriter,
    ) -> io::Result<(Self, bool)> {
        let stdio = [input.as_fd(), output.as_fd(), output.as_fd()];
        let born = cgroup
            .as_ref()
            .map(|cgroup| spawn::itself_into(cgroup.dir(), c"launch", stdio));
        let (pid, pidfd, is_in) = match born {
            Some(Ok((pid, pidfd))) => (pid, pidfd, true),
            // Without a group, or by an older kernel; the launcher enters it then.
            None | Some(Err(_)) => {
                let child = Command::new("/proc/self/exe")
                    .arg("launch")
                    .stdin(input)
                    .stdout(output.try_clone()?)
                    .stderr(output)
                    .spawn()?;
                let pid = child.id() as i32;
                (pid, pidfd_open(pid)?, false)
            }
        };
        let held = Self {
            pid,
            pidfd,
            status: None,
            cgroup,
        };
        Ok((held, is_in))
    }

    /// Its status, if it has ended; waits for that if it may.
    fn status(&mut self, flags: WaitPidFlag) -> Option<ExitStatus> {
        if self.status.is_none() {
            let waited = waitid(Id::PIDFd(self.pidfd.as_fd()), flags | WaitPidFlag::WEXITED);
            self.status = match waited {
                Ok(WaitStatus::Exited(_, code)) => Some(ExitStatus::from_raw(code << 8)),
                Ok(WaitStatus::Signaled(_, signal, _)) => Some(ExitStatus::from_raw(signal as i32)),
                // It is nobody's child here.
                Err(nix::Error::ECHILD) => pidfd_info::exit_status(self.pidfd.as_fd()),
                _ => None,
            };
        }
        self.status
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL);
        let _ = self.status(WaitPidFlag::empty());
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
        let writer = with_a_reader(&writer)?;
        let (held, is_in_its_group) = Held::launcher(launch.cgroup.clone(), theirs, writer)?;
        let mut launch = launch.clone();
        launch.cgroup.take_if(|_| is_in_its_group);
        launch::send(ours.as_fd(), &launch, fds)?;
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
        let output = Receiver::from_owned_fd(self.output.into())?;
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

    /// Takes over a process that an earlier daemon started. What it prints from now on, and what of
    /// it nobody has read, is recorded.
    ///
    /// # Errors
    /// What it prints can't be had: it has ended, say.
    pub fn adopt(survivor: Survivor, cgroup: Option<Cgroup>) -> io::Result<Self> {
        let Survivor { pid, pidfd } = survivor;
        let held = Held {
            pid,
            pidfd,
            status: None,
            cgroup,
        };
        let output = read_end(pid, 1)?;
        Ok(Self {
            held,
            console: Console::record(output),
        })
    }

    /// What it prints.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// How it ended, if it has.
    pub fn exit(&mut self) -> Option<Exit> {
        let status = self.held.status(WaitPidFlag::WNOHANG)?;
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
        self.held.pid
    }

    /// Its threads whose names begin like this.
    pub(super) fn threads(&self, name: &str) -> io::Result<Vec<i32>> {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.pid()));
        let is_it = |thread: &i32| {
            let comm = fs::read_to_string(tasks.join(thread.to_string()).join("comm"));
            comm.is_ok_and(|comm| comm.starts_with(name))
        };
        Ok(fs::read_dir(&tasks)?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(is_it)
            .collect())
    }

    /// Ends it and waits until it has.
    pub async fn kill(&mut self) {
        let _ = pidfd_signal(self.held.pidfd.as_fd(), libc::SIGKILL);
        self.ended().await;
        let _ = self.held.status(WaitPidFlag::empty());
    }
}

impl AsFd for VmmProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.pidfd.as_fd()
    }
}

/// A VMM's process that has outlived the daemon which started it.
#[derive(Debug)]
pub struct Survivor {
    /// Its number.
    pub pid: i32,
    /// Itself.
    pub pidfd: OwnedFd,
}

/// The same end of a pipe, which is a reader of it as well: whoever writes to it is not told that
/// nobody reads, when a daemon has ended and the next one is not there yet. Not every VMM bears that.
/// Such a pipe ends with its last writer still.
///
/// # Errors
/// As opening what `/proc` shows of it.
pub(super) fn with_a_reader(writer: &PipeWriter) -> io::Result<PipeWriter> {
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let both = File::options().read(true).write(true).open(path)?;
    Ok(OwnedFd::from(both).into())
}

/// What a process was told at its start; a program that shows its arguments as one has them there.
///
/// # Errors
/// There is no such process.
pub(super) fn arguments_of(pid: i32) -> io::Result<Vec<String>> {
    let arguments = fs::read(format!("/proc/{pid}/cmdline"))?;
    let arguments = String::from_utf8_lossy(&arguments);
    Ok(arguments.split(['\0', ' ']).map(str::to_owned).collect())
}

/// The other end of a pipe that a process writes to.
///
/// # Errors
/// There is no such process, or its descriptor is no pipe.
pub(super) fn read_end(pid: i32, descriptor: i32) -> io::Result<Receiver> {
    OpenOptions::new().open_receiver(format!("/proc/{pid}/fd/{descriptor}"))
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
