//! Stopping all processes that clients have started, and letting them go on: a control group with
//! the kernel's freezer, which they can't notice and can't leave.
//!
//! Source: Linux `Documentation/admin-guide/cgroup-v2.rst`, "cgroup.freeze".

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The group's name below the root of the hierarchy.
const NAME: &str = "sandbox";
/// How often to look whether all have stopped; they do so within a scheduling turn.
const LOOK: Duration = Duration::from_millis(1);

/// The group, if this machine has one to offer.
#[derive(Debug, Default)]
pub(crate) struct Freezer(Option<Group>);

#[derive(Debug)]
struct Group {
    directory: PathBuf,
    /// `cgroup.procs`, to be written by who joins.
    join: Arc<OwnedFd>,
}

/// Why processes were not stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FreezeError {
    /// No cgroup v2 hierarchy, or not one that we may use.
    #[error("This machine has no control groups to freeze processes with")]
    Unavailable,
    /// Some are still running; all have been let go on.
    #[error("Processes did not stop within {0} ms, and go on")]
    Slow(u128),
    /// The kernel refused.
    #[error("Writing {path}")]
    Failed { path: String, source: io::Error },
}

impl Freezer {
    /// Makes the group in a cgroup v2 directory; one without it can't freeze.
    pub(crate) fn within(hierarchy: &Path) -> io::Result<Freezer> {
        let directory = hierarchy.join(NAME);
        match fs::create_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let join = fs::File::options()
            .write(true)
            .open(directory.join("cgroup.procs"))?;
        Ok(Freezer(Some(Group {
            directory,
            join: Arc::new(join.into()),
        })))
    }

    /// What a new process has to write to, to be among those that are stopped.
    pub(crate) fn group(&self) -> Option<Arc<OwnedFd>> {
        self.0.as_ref().map(|group| Arc::clone(&group.join))
    }

    /// Stops all of them; blocks until they have, or the time is up.
    pub(crate) fn freeze(&self, patience: Duration) -> Result<(), FreezeError> {
        let group = self.0.as_ref().ok_or(FreezeError::Unavailable)?;
        group.set(true)?;
        let give_up = Instant::now() + patience;
        while !group.is_frozen()? {
            if Instant::now() >= give_up {
                group.set(false)?;
                return Err(FreezeError::Slow(patience.as_millis()));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Lets all of them go on; again is fine, and so is a machine that can't freeze.
    pub(crate) fn thaw(&self) -> Result<(), FreezeError> {
        self.0.as_ref().map_or(Ok(()), |group| group.set(false))
    }
}

impl Group {
    fn set(&self, frozen: bool) -> Result<(), FreezeError> {
        let path = self.directory.join("cgroup.freeze");
        let value = if frozen { "1" } else { "0" };
        fs::write(&path, value).map_err(|e| failed(&path, e))
    }

    fn is_frozen(&self) -> Result<bool, FreezeError> {
        let path = self.directory.join("cgroup.events");
        let events = fs::read_to_string(&path).map_err(|e| failed(&path, e))?;
        Ok(events.lines().any(|line| line == "frozen 1"))
    }
}

fn failed(path: &Path, source: io::Error) -> FreezeError {
    FreezeError::Failed {
        path: path.display().to_string(),
        source,
    }
}

/// Where the cgroup v2 hierarchy is mounted, by the text of /proc/self/mounts.
pub(crate) fn hierarchy(mounts: &str) -> Option<PathBuf> {
    let mut fields = mounts.lines().map(|line| line.split(' '));
    let found = fields.find_map(|mut line| {
        let point = line.nth(1)?;
        (line.next()? == "cgroup2").then_some(point)
    });
    found.map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchy_is_found_by_its_type() {
        let mounts = "cgroup2 /not proc rw 0 0\nnone /sys/fs/cgroup cgroup2 rw 0 0\n";
        assert_eq!(
            hierarchy(mounts).as_deref(),
            Some(Path::new("/sys/fs/cgroup"))
        );
        assert_eq!(hierarchy("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn machine_without_groups_says_so_and_thaws_all_the_same() {
        let freezer = Freezer::default();
        let refused = freezer.freeze(Duration::from_millis(1));
        assert!(matches!(refused, Err(FreezeError::Unavailable)));
        assert!(freezer.thaw().is_ok());
    }
}
