//! The processes of one place, found by what only they have: a network namespace, the disk they
//! see, or the socket on their standard input. Never by a name that others may have.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, poll};
use uffd_engine::sys::process::{pidfd_open, pidfd_signal};

use super::place::{Place, mount_source, names};

/// What a process is to its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Daemon,
    Engine,
    Vmm,
}

/// One process, held by pidfd.
pub(crate) struct Process {
    pub(crate) role: Role,
    pub(crate) pid: i32,
    pub(crate) command: String,
    pidfd: OwnedFd,
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let command: String = self.command.chars().take(80).collect();
        write!(f, "{} {:?} {command}", self.pid, self.role)
    }
}

impl Process {
    pub(crate) fn is_vmm(&self) -> bool {
        self.role == Role::Vmm
    }

    /// Whether it is the VMM of this sandbox.
    pub(crate) fn is_vmm_of(&self, id: &str) -> bool {
        self.is_vmm() && self.sees(&format!("/sandboxes/{id}/vmm "))
    }

    /// Whether a mount of its own begins in a directory that is called like this.
    pub(crate) fn sees(&self, directory: &str) -> bool {
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", self.pid));
        mounts.unwrap_or_default().contains(directory)
    }

    /// A line of its status, as numbers or words.
    pub(crate) fn status(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in:\n{text}"));
        line.split_whitespace().map(str::to_owned).collect()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: i32) {
        assert!(
            pidfd_signal(self.pidfd.as_fd(), signal).unwrap(),
            "{self:?} has ended"
        );
    }

    /// Sends a signal, unless it has ended.
    pub(crate) fn try_signal(&self, signal: i32) {
        let _ = pidfd_signal(self.pidfd.as_fd(), signal);
    }

    /// SIGKILL, and waits until it has ended.
    pub(crate) fn kill(&self) {
        self.try_signal(libc::SIGKILL);
        let ended = PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN);
        let _ = poll(&mut [ended], 10_000u16);
    }
}

/// All of them.
pub(crate) fn of(place: &Place) -> Vec<Process> {
    let marks = Marks::of(place);
    let mut found = Vec::new();
    for name in names(Path::new("/proc")) {
        let Ok(pid) = name.parse::<i32>() else {
            continue;
        };
        if pid == std::process::id() as i32 || marks.role(pid).is_none() {
            continue;
        }
        // Looked at again behind the pidfd: the number may have changed hands.
        let Ok(pidfd) = pidfd_open(pid) else { continue };
        let Some(role) = marks.role(pid) else {
            continue;
        };
        let command = command_of(pid);
        found.push(Process {
            role,
            pid,
            command,
            pidfd,
        });
    }
    found
}

/// The engine of a place whose daemon runs.
pub(crate) fn engine(place: &Place) -> Option<Process> {
    of(place)
        .into_iter()
        .find(|process| process.role == Role::Engine)
}

/// The VMM of a sandbox.
pub(crate) fn vmm(place: &Place, id: &str) -> Option<Process> {
    of(place).into_iter().find(|process| process.is_vmm_of(id))
}

struct Marks {
    namespaces: BTreeSet<(u64, u64)>,
    /// `socket:[inode]` of the sockets that are bound in the run directory.
    sockets: BTreeSet<String>,
    disks: String,
    /// As mountinfo has it, between blanks.
    source: String,
    config: String,
}

impl Marks {
    fn of(place: &Place) -> Self {
        let dir = Path::new("/run/netns");
        let prefix = format!("{}-", place.instance);
        let namespaces = names(dir)
            .into_iter()
            .filter(|name| name.starts_with(&prefix))
            .filter_map(|name| fs::metadata(dir.join(name)).ok())
            .map(|m| (m.dev(), m.ino()))
            .collect();
        let dirs = [&place.run, &place.root].map(|dir| format!("{}/", dir.display()));
        let sockets = fs::read_to_string("/proc/net/unix")
            .unwrap_or_default()
            .lines()
            .filter_map(|line| {
                // Num RefCount Protocol Flags Type St Inode Path
                let mut columns = line.split_whitespace().skip(6);
                let (inode, path) = (columns.next()?, columns.next()?);
                let ours = dirs.iter().any(|dir| path.starts_with(dir));
                ours.then(|| format!("socket:[{inode}]"))
            })
            .collect();
        Self {
            namespaces,
            sockets,
            source: format!(" {} ", mount_source(&place.instance)),
            disks: place.data.join("sandboxes").display().to_string(),
            config: place.config.display().to_string(),
        }
    }

    fn role(&self, pid: i32) -> Option<Role> {
        let at = |name: &str| format!("/proc/{pid}/{name}");
        let namespace = fs::metadata(at("ns/net")).map(|m| (m.dev(), m.ino()));
        if namespace.is_ok_and(|namespace| self.namespaces.contains(&namespace)) {
            return Some(Role::Vmm);
        }
        let input = fs::read_link(at("fd/0")).unwrap_or_default();
        if self.sockets.contains(&*input.to_string_lossy()) {
            return Some(Role::Engine);
        }
        if command_of(pid).contains(&self.config) {
            return Some(Role::Daemon);
        }
        // Its namespace may have lost its name; its disk has not.
        let mounts = fs::read_to_string(at("mountinfo")).unwrap_or_default();
        let disk = |line: &str| {
            line.contains(" /run/thaw-disk ")
                && (line.contains(&self.disks) || line.contains(&self.source))
        };
        mounts.lines().any(disk).then_some(Role::Vmm)
    }
}

fn command_of(pid: i32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}
