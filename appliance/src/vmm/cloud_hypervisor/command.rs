//! How a Cloud Hypervisor is started, as a value.
//!
//! ```text
//!   <run_dir>/vmm/api.sock      its API
//!   <run_dir>/vmm/give.sock     where it is given a guest
//!   <run_dir>/vmm/take.sock     where its guest is taken
//!   <run_dir>/vmm/own/          a guest for its own paging, until it has opened it
//!   /run/thaw-disk              the sandbox's disk
//! ```
//!
//! The paths of disk and tap device are in the configuration that a build keeps, and they are the
//! same for all.

use std::path::{Path, PathBuf};

use crate::vmm::Place;
use crate::vmm::cgroup::Cgroup;
use crate::vmm::launch::{Launch, Mount, descriptor};
use crate::vmm::prepared::Berth;

/// Which descriptor of the launch is the event monitor's.
const EVENTS_FD: usize = 0;

/// A backtrace reads the program's own file, which the filters of its threads don't allow; and it
/// makes errors, backtraces and all, whether there is any or not.
const NO_BACKTRACES: [&str; 2] = ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"];

/// Where the parts of one machine are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) dir: PathBuf,
}

impl Layout {
    pub(super) fn new(run_dir: &Path) -> Self {
        Self {
            dir: run_dir.join("vmm"),
        }
    }

    pub(super) fn api(&self) -> PathBuf {
        self.dir.join("api.sock")
    }

    pub(super) fn give(&self) -> PathBuf {
        self.dir.join("give.sock")
    }

    pub(super) fn take(&self) -> PathBuf {
        self.dir.join("take.sock")
    }

    pub(super) fn own(&self) -> PathBuf {
        self.dir.join("own")
    }

    /// The memory of a guest for its own paging, by the name that Cloud Hypervisor looks for.
    pub(super) fn own_memory(&self) -> PathBuf {
        self.own().join("memory-ranges")
    }

    /// The launch of one Cloud Hypervisor. A probe is nowhere.
    pub(super) fn launch(&self, program: &Path, place: Option<Where<'_>>) -> Launch {
        let args = [
            "--api-socket".to_owned(),
            format!("path={}", self.api().display()),
            "--event-monitor".to_owned(),
            format!("fd={}", descriptor(EVENTS_FD)),
            "--seccomp".to_owned(),
            "true".to_owned(),
        ];
        Launch {
            program: program.to_owned(),
            args: args.to_vec(),
            env: NO_BACKTRACES
                .map(|name| (name.to_owned(), "0".to_owned()))
                .into(),
            namespace: place.map(|place| place.namespace.to_owned()),
            mounts: place
                .and_then(|place| place.disk)
                .map(Mount::disk)
                .into_iter()
                .collect(),
            tap_owner: None,
            cgroup: place.and_then(|place| place.cgroup.cloned()),
        }
    }
}

/// Where a VMM runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Where<'a> {
    pub(super) namespace: &'a Path,
    /// What waits has none yet.
    pub(super) disk: Option<&'a Path>,
    pub(super) cgroup: Option<&'a Cgroup>,
}

impl<'a> From<&'a Place> for Where<'a> {
    fn from(place: &'a Place) -> Self {
        Self {
            namespace: &place.namespace,
            disk: Some(&place.disk),
            cgroup: place.cgroup.as_ref(),
        }
    }
}

impl<'a> From<&'a Berth> for Where<'a> {
    fn from(berth: &'a Berth) -> Self {
        Self {
            namespace: &berth.namespace,
            disk: None,
            cgroup: berth.cgroup.as_ref(),
        }
    }
}

/// As the API wants a socket's path.
pub(super) fn url(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_are_started_alike_but_for_their_sockets() {
        let launch = |run: &str, disk: &str| {
            let place = Place {
                name: "s".into(),
                template: "base".into(),
                slot: 1,
                run_dir: run.into(),
                namespace: "/run/netns/x".into(),
                disk: disk.into(),
                cgroup: None,
            };
            Layout::new(Path::new(run)).launch(Path::new("ch"), Some(Where::from(&place)))
        };
        let (a, b) = (launch("/run/a", "/data/a"), launch("/run/b", "/data/b"));
        assert_eq!(a.args[1], "path=/run/a/vmm/api.sock");
        assert_eq!(a.args[2..], b.args[2..]);
        assert_eq!(a.args[3], "fd={fd:0}");
        assert_eq!(a.args[4..], ["--seccomp", "true"]);
        // Ours may be set.
        assert_eq!(a.env["RUST_BACKTRACE"], "0");
        assert_eq!(a.mounts, [Mount::disk(Path::new("/data/a"))]);
    }
}
