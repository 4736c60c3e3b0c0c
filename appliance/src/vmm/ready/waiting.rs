//! One VMM that waits, and its end if it is of no use.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::host::remove_dir;
use crate::vmm::cgroup::Cgroup;
use crate::vmm::prepared::Prepared;

/// One that waits.
pub(super) struct Waiting {
    pub(super) prepared: Box<dyn Prepared>,
    pub(super) cgroup: Option<Cgroup>,
    pub(super) namespace: Namespace,
    pub(super) dir: PathBuf,
}

/// Device and inode of a namespace, by which it is told from a later one of the same name.
pub(super) type Namespace = (u64, u64);

pub(super) fn identity(namespace: &Path) -> io::Result<Namespace> {
    let found = fs::metadata(namespace)?;
    Ok((found.dev(), found.ino()))
}

/// Ends its process and removes what it had.
pub(super) fn end(waiting: Waiting) {
    // Its process first: it may still write there.
    drop(waiting.prepared);
    remove_dir(&waiting.dir);
}

/// Off the calling thread: a process takes a while to end.
pub(super) fn discard(waiting: Waiting) {
    tokio::task::spawn_blocking(move || end(waiting));
}

pub(super) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO) != Ok(0)
}
