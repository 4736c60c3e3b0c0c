//! Control groups (version 2): one per VMM, in one per daemon.
//!
//! ```text
//!   /sys/fs/cgroup/<instance>/<sandbox>    its VMM is born there
//!                            /ready.<n>    one that waits; whoever claims it stays there
//! ```
//!
//! A process that changes its group waits for every processor to come to rest, which takes
//! milliseconds, and leaves behind what it has used. So launchers are started in their group where the
//! kernel can do that, and a VMM that waited keeps its group: only the limits are set when it is
//! claimed. Controllers that the host doesn't have are named once and gone without; a group without
//! any still says which processes belong together.

mod limits;

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

pub use limits::Limits;

/// How long killed processes may take to be gone.
const END_TIME: Duration = Duration::from_secs(5);

/// What the kernel limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controller {
    /// Time.
    Cpu,
    /// Memory.
    Memory,
    /// Processes and threads.
    Pids,
}

impl Controller {
    const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Pids];
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
        })
    }
}

/// The daemon's group, in which its VMMs have theirs.
#[derive(Clone, Debug)]
pub struct Cgroups {
    dir: PathBuf,
    controllers: Vec<Controller>,
}

impl Cgroups {
    /// Makes the daemon's group, with the controllers that can be had, and says which can't.
    ///
    /// # Errors
    /// There is no hierarchy of version 2, or no group can be made in it.
    pub fn open(instance: &str) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let root = mount_point_in(&mounts);
        let root = root.ok_or_else(|| io::Error::other("no cgroup2 file system is mounted"))?;
        Self::open_below(&root, instance)
    }

    fn open_below(root: &Path, instance: &str) -> io::Result<Self> {
        let dir = root.join(instance);
        make_dir(&dir)?;
        let mut controllers = Vec::new();
        for controller in Controller::ALL {
            let enable = |group: &Path| {
                fs::write(
                    group.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                )
            };
            match enable(root).and_then(|()| enable(&dir)) {
                Ok(()) => controllers.push(controller),
                Err(error) => {
                    tracing::warn!(%controller, %error, "VMMs are not limited in this");
                }
            }
        }
        Ok(Self { dir, controllers })
    }

    /// A new group, without limits, for a process that is to be born in it.
    ///
    /// # Errors
    /// It can't be made.
    pub fn make(&self, name: &str) -> io::Result<Cgroup> {
        let group = Cgroup {
            dir: self.dir.join(name),
            controllers: self.controllers.iter().map(ToString::to_string).collect(),
        };
        // One that an earlier process left would count for this one.
        group.remove();
        make_dir(&group.dir)?;
        Ok(group)
    }

    /// The group that a process is in, if it is one of these.
    #[must_use]
    pub fn of(&self, pid: i32) -> Option<Cgroup> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        // The hierarchy of version 2 has number 0. Source: cgroups(7).
        let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
        let name = Path::new(path).file_name()?;
        let dir = self.dir.join(name);
        let ours = fs::read_to_string(dir.join("cgroup.procs")).ok()?;
        let is_in = ours.lines().any(|line| line.parse() == Ok(pid));
        is_in.then(|| Cgroup {
            dir,
            controllers: self.controllers.iter().map(ToString::to_string).collect(),
        })
    }

    /// The names of all groups that exist.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        dirs.filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// Removes a group that may be there.
    pub fn remove(&self, name: &str) {
        remove(&self.dir.join(name));
    }

    /// Ends every process of a group, and removes it; one that is not there is no error.
    ///
    /// # Errors
    /// The kernel refuses, or the processes don't end.
    pub fn end(&self, name: &str) -> io::Result<()> {
        end(&self.dir.join(name))
    }

    /// Removes the daemon's group, when no VMM is left.
    pub fn close(&self) {
        for name in self.names() {
            let _ = fs::remove_dir(self.dir.join(name));
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

/// One VMM's group. It is removed by whoever holds the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    dir: PathBuf,
    controllers: Vec<String>,
}

impl Cgroup {
    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes the calling process in.
    ///
    /// # Errors
    /// As a write to `cgroup.procs`.
    pub fn enter(&self) -> io::Result<()> {
        fs::write(self.dir.join("cgroup.procs"), "0")
    }

    /// Sets what may be taken from now on.
    ///
    /// # Errors
    /// Which file, and why; others may be set.
    pub fn limit(&self, limits: &Limits) -> io::Result<()> {
        for (controller, file, value) in limits.settings() {
            if !self.controllers.contains(&controller.to_string()) {
                continue;
            }
            fs::write(self.dir.join(file), value)
                .map_err(|error| io::Error::new(error.kind(), format!("{file}: {error}")))?;
        }
        Ok(())
    }

    /// Lets it take so much more memory than before, or less.
    ///
    /// # Errors
    /// As reading and writing `memory.max`; that there is no limit is none.
    pub fn change_memory(&self, by_bytes: i64) -> io::Result<()> {
        let file = self.dir.join("memory.max");
        let text = match fs::read_to_string(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            text => text?,
        };
        match text.trim().parse::<u64>() {
            Ok(bytes) => fs::write(file, bytes.saturating_add_signed(by_bytes).to_string()),
            Err(_) => Ok(()),
        }
    }

    /// How many of its processes the kernel has ended for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.dir.join("memory.events")).unwrap_or_default();
        number_in(&events, "oom_kill")
    }

    /// Removes it, and ends what the process it was for has left in it.
    pub fn remove(&self) {
        remove(&self.dir);
    }
}

/// Ends all groups that an earlier daemon of this name left, with what is in them, but for those in
/// which these processes are; says how many.
///
/// # Errors
/// The kernel refuses, or the processes don't end.
pub fn end_left_over(cgroups: &Cgroups, kept: &[i32]) -> io::Result<usize> {
    let kept: Vec<Cgroup> = kept.iter().filter_map(|pid| cgroups.of(*pid)).collect();
    let is_kept = |name: &String| kept.iter().any(|group| group.dir == cgroups.dir.join(name));
    let mut names = cgroups.names();
    names.retain(|name| !is_kept(name));
    for name in &names {
        cgroups.end(name)?;
    }
    Ok(names.len())
}

fn remove(dir: &Path) {
    let removed = match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => end(dir),
        removed => removed,
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(group = %dir.display(), %error, "A control group is left over");
        }
        _ => {}
    }
}

fn end(dir: &Path) -> io::Result<()> {
    match fs::write(dir.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        done => done?,
    }
    let mut events = File::open(dir.join("cgroup.events"))?;
    let deadline = Instant::now() + END_TIME;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if number_in(&text, "populated") == 0 {
            return fs::remove_dir(dir);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        // The kernel tells of a change by POLLPRI.
        let wait = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], wait)?;
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Where the hierarchy of version 2 is mounted. Source: proc_pid_mounts(5).
fn mount_point_in(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut columns = line.split(' ').skip(1);
        let (at, kind) = (columns.next()?, columns.next()?);
        (kind == "cgroup2").then(|| at.into())
    })
}

/// A line of an event file, `name 12`.
fn number_in(text: &str, name: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_of_version_2_is_found_beside_the_older_ones() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let found = mount_point_in(mounts);
        assert_eq!(found, Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point_in("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn events_are_told_apart_by_their_whole_name() {
        let events = "oom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(number_in(events, "oom_kill"), 2);
        assert_eq!(number_in(events, "oom"), 3);
        assert_eq!(number_in(events, "max"), 0);
    }
}
