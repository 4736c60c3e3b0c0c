//! The userfaultfd that a VMM has kept of the memory it handed over, found among its descriptors.
//!
//! A duplicate of it is as good as the one that came with the hand-off: both are one userfaultfd,
//! which the kernel ends with the last of them.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use thiserror::Error;
use uffd_engine::sys::process::{pidfd_getfd, pidfd_signal};

/// What `/proc` shows of one.
///
/// Source: `fs/userfaultfd.c`.
const LINK: &str = "anon_inode:[userfaultfd]";

/// Why there is none to be had.
#[derive(Debug, Error)]
pub enum UserfaultfdError {
    /// Not allowed, or the process is gone.
    #[error("Looking for a userfaultfd among a VMM's descriptors")]
    Look(#[from] io::Error),
    /// Which is the memory's?
    #[error("The VMM has {count} userfaultfds, where its memory has one")]
    NotOne {
        /// How many there are.
        count: usize,
    },
    /// What was looked at may have been another process.
    #[error("The VMM has ended")]
    Ended,
}

/// A duplicate of the only one that a process has.
///
/// # Errors
/// It has none or several, or they can't be looked at.
pub(super) fn of(pid: i32, process: &OwnedFd) -> Result<OwnedFd, UserfaultfdError> {
    let descriptors = look(pid, process)?;
    let [descriptor] = descriptors[..] else {
        let count = descriptors.len();
        return Err(UserfaultfdError::NotOne { count });
    };
    let duplicate = pidfd_getfd(process.as_fd(), descriptor)?;
    // The number may have changed hands since.
    let link = fs::read_link(format!("/proc/self/fd/{}", duplicate.as_raw_fd()))?;
    if link != Path::new(LINK) {
        return Err(UserfaultfdError::NotOne { count: 0 });
    }
    Ok(duplicate)
}

/// How many a process has.
///
/// # Errors
/// They can't be looked at.
pub(super) fn count(pid: i32, process: &OwnedFd) -> Result<usize, UserfaultfdError> {
    look(pid, process).map(|descriptors| descriptors.len())
}

fn look(pid: i32, process: &OwnedFd) -> Result<Vec<RawFd>, UserfaultfdError> {
    let mut links = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        // One that was closed meanwhile.
        let Ok(link) = fs::read_link(&path) else {
            continue;
        };
        links.push((path, link));
    }
    // It lives, so the number was its own all the while.
    if !pidfd_signal(process.as_fd(), 0)? {
        return Err(UserfaultfdError::Ended);
    }
    Ok(userfaultfds(&links))
}

/// Those among a process's descriptors, as `/proc` names them, that are userfaultfds.
fn userfaultfds(links: &[(PathBuf, PathBuf)]) -> Vec<RawFd> {
    let are = links.iter().filter(|(_, link)| link == Path::new(LINK));
    are.filter_map(|(path, _)| path.file_name()?.to_str()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use uffd_engine::sys::process::pidfd_open;
    use uffd_engine::sys::uffd::Uffd;

    use super::*;

    #[test]
    fn userfaultfds_are_told_from_other_descriptors() {
        let links = [
            ("0", "/dev/null"),
            ("3", "anon_inode:[eventpoll]"),
            ("11", "anon_inode:[userfaultfd]"),
            ("12", "/tmp/anon_inode:[userfaultfd]"),
            ("13", "anon_inode:[userfaultfd] (deleted)"),
            ("7", "anon_inode:[userfaultfd]"),
            ("x", "anon_inode:[userfaultfd]"),
        ];
        let links = links.map(|(name, link)| (Path::new("/proc/1/fd").join(name), link.into()));
        assert_eq!(userfaultfds(&links), [11, 7]);
        assert!(userfaultfds(&[]).is_empty());
    }

    #[test]
    fn the_only_one_of_a_process_is_had_and_several_are_not() {
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = other.id() as i32;
        let pidfd = pidfd_open(pid).unwrap();
        let found = of(pid, &pidfd);
        assert!(matches!(found, Err(UserfaultfdError::NotOne { count: 0 })));
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(of(pid, &pidfd).is_err());

        let own = std::process::id() as i32;
        let pidfd = pidfd_open(own).unwrap();
        let Ok(_one) = Uffd::create(0) else {
            return println!("skipped: no userfaultfd");
        };
        if count(own, &pidfd).unwrap() == 1 {
            let duplicate = of(own, &pidfd).unwrap();
            let found = of(own, &pidfd);
            assert!(matches!(found, Err(UserfaultfdError::NotOne { count: 2 })));
            drop(duplicate);
        }
    }
}
