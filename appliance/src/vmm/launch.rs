//! `thaw launch`: the small process that becomes a VMM.
//!
//! The daemon starts it with `posix_spawn` (cheap from a big process), and sends it what
//! to become, with descriptors, over the socket on its standard input. It enters the
//! sandbox's network namespace, takes a private mount namespace in which the sandbox's
//! disk lies under the path that every VMM uses, and executes the VMM. Until then every
//! failure goes back over that socket; its silent end means that the VMM runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};
use uffd_engine::control;

/// Where every VMM finds its disk.
pub const DISK_PATH: &str = "/run/thaw-disk";

/// Written for descriptor `n` of the message in arguments and environment: `{fd:n}`
/// becomes its number in the VMM.
#[must_use]
pub fn descriptor(n: usize) -> String {
    format!("{{fd:{n}}}")
}

/// What to become.
#[derive(Debug, Serialize, Deserialize)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Added to the environment.
    pub env: BTreeMap<String, String>,
    /// Network namespace to enter.
    pub namespace: PathBuf,
    /// What to show at [`DISK_PATH`].
    pub disk: PathBuf,
}

/// Why it did not happen; sent back to the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub struct LaunchFailure {
    /// The step and its cause.
    pub reason: String,
}

/// The launcher's whole life. Returns only on failure, with the exit status.
#[must_use]
pub fn run() -> u8 {
    let Ok(socket) = io::stdin().as_fd().try_clone_to_owned() else {
        return 1;
    };
    let failure = match receive(&socket) {
        Ok((launch, fds)) => become_vmm(&launch, &fds),
        Err(error) => LaunchFailure {
            reason: format!("receiving what to launch: {error}"),
        },
    };
    let _ = control::send(socket.as_fd(), &failure, &[]);
    1
}

fn receive(socket: &OwnedFd) -> io::Result<(Launch, Vec<OwnedFd>)> {
    control::receive(socket.as_fd())?.ok_or_else(|| io::Error::other("nothing came"))
}

fn become_vmm(launch: &Launch, fds: &[OwnedFd]) -> LaunchFailure {
    match prepare(launch, fds) {
        Err((step, error)) => LaunchFailure {
            reason: format!("{step}: {error}"),
        },
        Ok(()) => {
            let fill = |text: &str| fill_descriptors(text, fds);
            let error = Command::new(&launch.program)
                .args(launch.args.iter().map(|arg| fill(arg)))
                .envs(launch.env.iter().map(|(name, value)| (name, fill(value))))
                .stdin(std::process::Stdio::null())
                .exec();
            LaunchFailure {
                reason: format!("running {}: {error}", launch.program.display()),
            }
        }
    }
}

fn prepare(launch: &Launch, fds: &[OwnedFd]) -> Result<(), (&'static str, io::Error)> {
    let namespace =
        File::open(&launch.namespace).map_err(|error| ("opening the network namespace", error))?;
    setns(&namespace, CloneFlags::CLONE_NEWNET)
        .map_err(|error| ("entering the network namespace", error.into()))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| ("making a mount namespace", error.into()))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(|error| ("detaching our mounts from the host's", error.into()))?;
    mount(
        Some(&launch.disk),
        Path::new(DISK_PATH),
        none,
        MsFlags::MS_BIND,
        none,
    )
    .map_err(|error| ("showing the disk at its path", error.into()))?;
    for fd in fds {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))
            .map_err(|error| ("passing descriptors on", error.into()))?;
    }
    Ok(())
}

fn fill_descriptors(text: &str, fds: &[OwnedFd]) -> String {
    let mut text = text.to_owned();
    for (n, fd) in fds.iter().enumerate() {
        text = text.replace(&descriptor(n), &fd.as_raw_fd().to_string());
    }
    text
}

/// Makes sure that [`DISK_PATH`] exists to be mounted over.
///
/// # Errors
/// `/run` can't be written.
pub fn prepare_host() -> io::Result<()> {
    File::options()
        .create(true)
        .append(true)
        .open(DISK_PATH)
        .map(|_| ())
}

/// The daemon's side: sends what to become.
///
/// # Errors
/// As `sendmsg(2)`.
pub fn send(socket: BorrowedFd<'_>, launch: &Launch, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    control::send(socket, launch, fds)
}
