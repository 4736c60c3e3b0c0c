//! Mount namespaces of other processes: the calling thread goes there and comes back, and mounts
//! that belong nowhere yet are taken along.
#![expect(unsafe_code, reason = "open_tree and move_mount have no wrapper")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chroot, fchdir};

// Source: linux/mount.h.
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;

/// A second view of a file that is mounted nowhere yet; it goes with its last descriptor.
///
/// # Errors
/// As `open_tree(2)`.
pub fn detached(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a C string that outlives the call; a result that is not negative is a new
    // descriptor that we own.
    let raw = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(raw as RawFd) })
}

/// Mounts what [`detached`] gave over a file, in the namespace of the calling thread.
///
/// # Errors
/// As `move_mount(2)`.
pub fn attach(mount: BorrowedFd<'_>, at: &Path) -> io::Result<()> {
    let at = CString::new(at.as_os_str().as_bytes())?;
    // SAFETY: both paths are C strings that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            at.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Runs `inside` with the calling thread in the mount namespace of the process behind a pidfd,
/// where paths begin at that namespace's root, and brings the thread back. Nobody else of this
/// process notices.
///
/// # Errors
/// The process has ended, or `inside` failed.
///
/// # Panics
/// There is no way back: the thread would go on with another's files.
pub fn within<T>(process: BorrowedFd<'_>, inside: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let place = |path: &str| {
        File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(path)
    };
    let (root, here) = (place("/")?, place(".")?);
    let home = File::open("/proc/thread-self/ns/mnt")?;
    // Threads share root and working directory, which change with the namespace.
    unshare(CloneFlags::CLONE_FS)?;
    setns(process, CloneFlags::CLONE_NEWNS)?;
    let result = inside();
    let back = setns(home.as_fd(), CloneFlags::CLONE_NEWNS)
        .and_then(|()| fchdir(&root))
        .and_then(|()| chroot("."))
        .and_then(|()| fchdir(&here));
    back.unwrap_or_else(|error| panic!("the thread lost its own mount namespace: {error}"));
    result
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use uffd_engine::sys::process::pidfd_open;

    use super::*;

    #[test]
    fn what_is_brought_is_seen_by_the_other_process_alone() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: what_is_brought_is_seen_by_the_other_process_alone: not root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (from, at) = (dir.path().join("from"), dir.path().join("at"));
        fs::write(&from, "brought").unwrap();
        fs::write(&at, "").unwrap();
        let mut other = Command::new("unshare");
        other.args(["--mount", "sleep", "600"]).stdin(Stdio::null());
        let mut other = other.process_group(0).spawn().unwrap();
        let pidfd = pidfd_open(other.id() as i32).unwrap();
        let namespace = |who: &str| fs::read_link(format!("/proc/{who}/ns/mnt")).unwrap();
        while namespace(&other.id().to_string()) == namespace("self") {
            std::thread::yield_now();
        }
        let before = std::env::current_dir().unwrap();
        let mount = detached(&from).unwrap();
        within(pidfd.as_fd(), || attach(mount.as_fd(), &at)).unwrap();
        let seen = format!("/proc/{}/root{}", other.id(), at.display());
        let seen = fs::read_to_string(seen);
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(seen.unwrap(), "brought");
        assert_eq!(fs::read_to_string(&at).unwrap(), "");
        assert_eq!(namespace("thread-self"), namespace("self"));
        assert_eq!(std::env::current_dir().unwrap(), before);
        let gone = within(pidfd.as_fd(), || Ok(())).unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ESRCH));
    }
}
