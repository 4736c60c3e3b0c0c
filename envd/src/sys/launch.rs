//! What happens in a child between fork and exec: session, groups, user, directory, in that order.
//!
//! Every step is checked, and a failed one reaches the parent as the error of `spawn`: a process
//! never runs with more rights than asked for. The directory comes after the user, so that it is
//! entered with that user's rights. Signal mask and SIGPIPE are reset by the standard library.
#![expect(unsafe_code, reason = "CommandExt::pre_exec")]

use std::ffi::CString;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::unistd::{Gid, Uid, chdir, setgid, setgroups, setsid, setuid};

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

/// Makes `command` start in a session of its own, as `credentials`, in `directory`.
pub(crate) fn prepare(command: &mut Command, credentials: Option<Credentials>, directory: CString) {
    let who = credentials.map(|c| {
        let groups: Vec<Gid> = c.groups.into_iter().map(Gid::from_raw).collect();
        (Uid::from_raw(c.uid), Gid::from_raw(c.gid), groups)
    });
    let between_fork_and_exec = move || {
        setsid()?;
        if let Some((uid, gid, groups)) = &who {
            setgroups(groups)?;
            setgid(*gid)?;
            setuid(*uid)?;
        }
        chdir(directory.as_c_str())?;
        Ok(())
    };
    // SAFETY: the closure runs in the forked child of a process that may have other threads, where
    // only async-signal-safe functions are allowed. It makes five system calls through nix, which
    // neither allocate nor lock for these argument types; everything it reads was allocated before
    // the fork, and an errno becomes an io::Error without allocation.
    unsafe { command.pre_exec(between_fork_and_exec) };
}
