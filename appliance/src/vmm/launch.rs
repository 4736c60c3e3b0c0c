//! `thaw launch`: the small process that becomes a VMM.
//!
//! The daemon starts it with `posix_spawn` (cheap from a big process), and sends it what
//! to become, with descriptors, over the socket on its standard input. It enters the
//! sandbox's network namespace, takes a private mount namespace in which the sandbox's
//! disk lies under the path that every VMM uses, becomes the VMM's user, and executes the VMM. Until then every
//! failure goes back over that socket; its silent end means that the VMM runs. What it mounts
//! is seen by the VMM alone and goes with it.

use std::collections::BTreeMap;
use std::fs::{self, File};
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
use uffd_engine::sys::process::die_with_parent;

use super::cgroup::Cgroup;
use super::own_user::OwnUser;
use crate::sys::{spawn, tap};

/// Where every VMM finds its disk.
pub const DISK_PATH: &str = "/run/thaw-disk";
/// Where every VMM finds the directory of its own that it shares with the daemon.
pub const DIR_PATH: &str = "/run/thaw-vmm";
/// Where it finds the kernel that it boots, and the initial RAM disk.
pub const KERNEL_PATH: &str = "/run/thaw-kernel";
/// See there.
pub const INITRD_PATH: &str = "/run/thaw-initrd";

/// Written for descriptor `n` of the message in arguments and environment: `{fd:n}`
/// becomes its number in the VMM.
#[must_use]
pub fn descriptor(n: usize) -> String {
    format!("{{fd:{n}}}")
}

/// Something to show to the VMM alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mount {
    /// A file or directory of the host at another path, which is made if need be.
    Bind {
        /// What.
        from: PathBuf,
        /// Where.
        at: PathBuf,
    },
    /// Empty memory, in which devices work.
    Tmpfs {
        /// Where.
        at: PathBuf,
        /// How much fits.
        bytes: u64,
        /// Whose it is.
        owner: u32,
    },
}

/// What to become.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Added to the environment.
    pub env: BTreeMap<String, String>,
    /// Network namespace to enter; if there is none, a new one without any link, and then it
    /// ends with the thread that started it.
    pub namespace: Option<PathBuf>,
    /// What to show it, one after the other.
    pub mounts: Vec<Mount>,
    /// A tap device of the namespace, and who may use it without privilege.
    pub tap_owner: Option<(String, u32)>,
    /// The control group to be in, for a launcher that wasn't born there.
    pub cgroup: Option<Cgroup>,
    /// Who to be, if not the daemon's user.
    pub user: Option<OwnUser>,
}

impl Mount {
    /// The disk at the path that all VMMs find it under.
    #[must_use]
    pub fn disk(from: &Path) -> Self {
        Self::at(DISK_PATH, from)
    }

    /// A file or directory at one of the paths that are the same for all VMMs.
    #[must_use]
    pub fn at(at: &str, from: &Path) -> Self {
        Self::Bind {
            from: from.to_owned(),
            at: at.into(),
        }
    }

    fn make(&self) -> io::Result<()> {
        let none: Option<&str> = None;
        match self {
            Self::Bind { from, at } => {
                make_mount_point(at, from.is_dir())?;
                mount(Some(from), at, none, MsFlags::MS_BIND, none)?;
            }
            Self::Tmpfs { at, bytes, owner } => {
                make_mount_point(at, true)?;
                let options = format!("size={bytes},mode=0700,uid={owner},gid={owner}");
                let (kind, options) = (Some("tmpfs"), Some(options.as_str()));
                mount(kind, at, kind, MsFlags::MS_NOSUID, options)?;
            }
        }
        Ok(())
    }
}

fn make_mount_point(at: &Path, is_dir: bool) -> io::Result<()> {
    if at.exists() {
        return Ok(());
    }
    if is_dir {
        return fs::create_dir_all(at);
    }
    if let Some(parent) = at.parent() {
        fs::create_dir_all(parent)?;
    }
    File::create(at).map(|_| ())
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
    spawn::unblock_signals();
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

fn prepare(launch: &Launch, fds: &[OwnedFd]) -> Result<(), (String, io::Error)> {
    let at = |step: &str| {
        let step = step.to_owned();
        move |error: io::Error| (step, error)
    };
    if let Some(cgroup) = &launch.cgroup {
        // Before anything is used that should count.
        cgroup.enter().map_err(at("entering its control group"))?;
    }
    match &launch.namespace {
        Some(namespace) => {
            let namespace = File::open(namespace).map_err(at("opening the network namespace"))?;
            setns(&namespace, CloneFlags::CLONE_NEWNET)
                .map_err(|error| at("entering the network namespace")(error.into()))?;
        }
        None => {
            // Nothing would find it by its namespace after the daemon's sudden end.
            die_with_parent().map_err(at("tying it to the daemon"))?;
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| at("making a network namespace")(error.into()))?;
        }
    }
    if let Some((name, user)) = &launch.tap_owner {
        tap::set_owner(name, *user).map_err(at("giving the tap device to the VMM's user"))?;
    }
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(|error| at("making a mount namespace")(error.into()))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(|error| at("detaching our mounts from the host's")(error.into()))?;
    if let Some(user) = &launch.user {
        let shown = user.show_devices();
        shown.map_err(at("making devices that are its user's"))?;
    }
    for mount in &launch.mounts {
        mount.make().map_err(at(&format!("mounting {mount:?}")))?;
    }
    for fd in fds {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))
            .map_err(|error| at("passing descriptors on")(error.into()))?;
    }
    if let Some(user) = &launch.user {
        user.become_it(fds)?;
        if launch.namespace.is_none() {
            // The kernel forgets it when the user changes.
            die_with_parent().map_err(at("tying it to the daemon"))?;
        }
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
