//! What happens in a child between fork and exec: session, terminal, groups, user, directory.
//!
//! Every step is checked, and a failed one reaches the parent as the error of `spawn`: a process
//! never runs with more rights than asked for. The directory comes after the user, so that it is
//! entered with that user's rights. Signal mask and SIGPIPE are reset by the standard library.
#![expect(unsafe_code, reason = "CommandExt::pre_exec")]

use std::ffi::CString;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::Arc;

use nix::libc;
use nix::unistd::{Gid, Uid, chdir, setgid, setgroups, setsid, setuid};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Who the child becomes; absent when that is who we are already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// User.
    pub(crate) uid: u32,
    /// Primary group.
    pub(crate) gid: u32,
    /// All groups, the primary one among them.
    pub(crate) groups: Vec<u32>,
}

/// Everything that a child arranges for itself.
#[derive(Debug)]
pub(crate) struct Setting {
    /// Whom to become, if not who we are.
    pub(crate) credentials: Option<Credentials>,
    /// Where to start.
    pub(crate) directory: CString,
    /// Whether standard input is a terminal, which is to control the session.
    pub(crate) terminal: bool,
    /// Limit of open files to go back to.
    pub(crate) open_files: Option<Rlimit>,
    /// `cgroup.procs` of the control group to join, open for writing.
    pub(crate) group: Option<Arc<OwnedFd>>,
}

/// Makes `command` start in a session of its own, in that setting.
pub(crate) fn prepare(command: &mut Command, setting: Setting) {
    let who = setting.credentials.map(|c| {
        let groups: Vec<Gid> = c.groups.into_iter().map(Gid::from_raw).collect();
        (Uid::from_raw(c.uid), Gid::from_raw(c.gid), groups)
    });
    let between_fork_and_exec = move || {
        setsid()?;
        if setting.terminal {
            // SAFETY: the standard library has just made descriptor 0 the terminal, and nobody
            // closes it before exec.
            let terminal = unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) };
            rustix::process::ioctl_tiocsctty(terminal)?;
        }
        if let Some(limit) = setting.open_files {
            setrlimit(Resource::Nofile, limit)?;
        }
        if let Some(group) = &setting.group {
            // Whoever writes it joins.
            rustix::io::write(group.as_ref(), b"0")?;
        }
        if let Some((uid, gid, groups)) = &who {
            setgroups(groups)?;
            setgid(*gid)?;
            setuid(*uid)?;
        }
        chdir(setting.directory.as_c_str())?;
        Ok(())
    };
    // SAFETY: the closure runs in the forked child of a process that may have other threads, where
    // only async-signal-safe functions are allowed. It makes system calls through nix and rustix,
    // which neither allocate nor lock for these argument types; everything it reads was allocated
    // before the fork, and an errno becomes an io::Error without allocation.
    unsafe { command.pre_exec(between_fork_and_exec) };
}
