//! What the first process of a machine does before anything else: mounts, and loopback.
//!
//! Whatever an init script has mounted already stays. A step that fails is reported and skipped:
//! a guest without /dev/pts is still worth talking to, a dead PID 1 is a kernel panic.

use std::fs;
use std::io;

use nix::mount::{MsFlags, mount};

use crate::sys;

/// Source, target, type, flags, options; in the order in which they can be mounted.
type Mount = (
    &'static str,
    &'static str,
    &'static str,
    MsFlags,
    &'static str,
);

const QUIET: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

const MOUNTS: [Mount; 7] = [
    ("proc", "/proc", "proc", QUIET.union(MsFlags::MS_NOEXEC), ""),
    (
        "sysfs",
        "/sys",
        "sysfs",
        QUIET.union(MsFlags::MS_NOEXEC),
        "",
    ),
    (
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        QUIET.union(MsFlags::MS_NOEXEC),
        "",
    ),
    (
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MsFlags::MS_NOSUID,
        "mode=0755",
    ),
    (
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID,
        "gid=5,mode=0620,ptmxmode=0666",
    ),
    ("tmpfs", "/run", "tmpfs", QUIET, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", QUIET, "mode=1777"),
];

/// Mounts what is missing and brings `lo` up.
pub(crate) fn set_up_machine() {
    for entry in MOUNTS {
        // Read anew each time: before /proc is mounted there is nothing to read.
        let mounted = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        if !is_mounted(&mounted, entry.1) {
            report(entry.1, mount_one(entry));
        }
    }
    report("lo", sys::loopback::up());
}

fn mount_one((source, target, kind, flags, options): Mount) -> io::Result<()> {
    fs::create_dir_all(target)?;
    mount(Some(source), target, Some(kind), flags, Some(options))?;
    Ok(())
}

/// Whether a line of /proc/self/mounts has this mount point.
fn is_mounted(mounts: &str, target: &str) -> bool {
    mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(target))
}

fn report(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        eprintln!("envd: Setting up {what}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_compared_whole() {
        let mounts = "proc /proc proc rw 0 0\nudev /dev devtmpfs rw 0 0\n";
        assert!(is_mounted(mounts, "/proc"));
        assert!(is_mounted(mounts, "/dev"));
        assert!(!is_mounted(mounts, "/dev/pts"));
        assert!(!is_mounted(mounts, "/pro"));
    }
}
