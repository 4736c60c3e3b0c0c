//! How a Cloud Hypervisor is started, as a value.
//!
//! ```text
//!   on the host                 as it finds it
//!   <run_dir>/vmm/api.sock      /run/thaw-vmm/api.sock      its API
//!   <run_dir>/vmm/give.sock     /run/thaw-vmm/give.sock     where it is given a guest
//!   <run_dir>/vmm/take.sock     /run/thaw-vmm/take.sock     where its guest is taken
//!   <run_dir>/vmm/own/          /run/thaw-vmm/own/          a guest for its own paging, until it
//!                                                           has opened it
//!   the sandbox's disk          /run/thaw-disk
//!   kernel, initrd              /run/thaw-kernel, -initrd
//! ```
//!
//! The paths of disk and tap device are in the configuration that a build keeps, and they are the
//! same for all. Its own directory is at the same path for all, too: one that waited has it under
//! another name on the host later, and a user of its own could not enter those above it.

use std::path::{Path, PathBuf};

use crate::network::address::TAP;
use crate::vmm::cgroup::Cgroup;
use crate::vmm::launch::{DIR_PATH, INITRD_PATH, KERNEL_PATH, Launch, Mount, descriptor};
use crate::vmm::own_user::{KVM, OwnUser, TUN, USERFAULTFD};
use crate::vmm::prepared::Berth;
use crate::vmm::{DiskLimits, Place};

/// What it is told its event monitor after.
pub(super) const EVENT_MONITOR: &str = "--event-monitor";

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

    /// The same path as the VMM finds it.
    pub(super) fn inside(&self, on_host: &Path) -> PathBuf {
        let below = on_host.strip_prefix(&self.dir).unwrap_or(on_host);
        Path::new(DIR_PATH).join(below)
    }

    /// The memory of a guest for its own paging, by the name that Cloud Hypervisor looks for.
    pub(super) fn own_memory(&self) -> PathBuf {
        self.own().join("memory-ranges")
    }

    /// The launch of one Cloud Hypervisor. A probe is nowhere.
    pub(super) fn launch(
        &self,
        program: &Path,
        place: Option<Where<'_>>,
        boot: Option<Boot<'_>>,
        user: Option<u32>,
    ) -> Launch {
        let args = [
            "--api-socket".to_owned(),
            format!("path={}", self.inside(&self.api()).display()),
            EVENT_MONITOR.to_owned(),
            format!("fd={}", descriptor(EVENTS_FD)),
            "--seccomp".to_owned(),
            "true".to_owned(),
        ];
        let mut mounts = vec![Mount::at(DIR_PATH, &self.dir)];
        if let Some(Boot { kernel, initrd }) = boot {
            mounts.push(Mount::at(KERNEL_PATH, kernel));
            mounts.extend(initrd.map(|initrd| Mount::at(INITRD_PATH, initrd)));
        }
        mounts.extend(place.and_then(|place| place.disk).map(Mount::disk));
        Launch {
            program: program.to_owned(),
            args: args.to_vec(),
            env: NO_BACKTRACES
                .map(|name| (name.to_owned(), "0".to_owned()))
                .into(),
            namespace: place.map(|place| place.namespace.to_owned()),
            mounts,
            tap_owner: user
                .filter(|_| place.is_some())
                .map(|user| (TAP.to_owned(), user)),
            cgroup: place.and_then(|place| place.cgroup.cloned()),
            user: user.map(own_user),
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
    /// Its number, which says who the VMM is.
    pub(super) slot: u32,
    pub(super) disk_limits: DiskLimits,
}

impl<'a> From<&'a Place> for Where<'a> {
    fn from(place: &'a Place) -> Self {
        Self {
            namespace: &place.namespace,
            disk: Some(&place.disk),
            cgroup: place.cgroup.as_ref(),
            slot: place.slot,
            disk_limits: place.disk_limits,
        }
    }
}

impl<'a> From<&'a Berth> for Where<'a> {
    fn from(berth: &'a Berth) -> Self {
        Self {
            namespace: &berth.namespace,
            disk: None,
            cgroup: berth.cgroup.as_ref(),
            slot: berth.slot,
            disk_limits: DiskLimits::default(),
        }
    }
}

/// What a guest is booted from; a probe has no RAM disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Boot<'a> {
    /// As an ELF file.
    pub(super) kernel: &'a Path,
    pub(super) initrd: Option<&'a Path>,
}

/// Who a Cloud Hypervisor is.
pub(super) fn own_user(id: u32) -> OwnUser {
    OwnUser {
        id,
        devices: [KVM, TUN, USERFAULTFD].map(PathBuf::from).to_vec(),
        faults: false,
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
    fn clones_are_started_alike() {
        let launch = |run: &str, disk: &str, user| {
            let place = Place {
                name: "s".into(),
                template: "base".into(),
                slot: 1,
                run_dir: run.into(),
                namespace: "/run/netns/x".into(),
                disk: disk.into(),
                disk_limits: DiskLimits::default(),
                cgroup: None,
            };
            let boot = Boot {
                kernel: Path::new("/data/elf"),
                initrd: Some(Path::new("/data/initrd")),
            };
            let place = Some(Where::from(&place));
            Layout::new(Path::new(run)).launch(Path::new("ch"), place, Some(boot), user)
        };
        let a = launch("/run/a", "/data/a", Some(7));
        let b = launch("/run/b", "/data/b", None);
        assert_eq!(a.args[1], "path=/run/thaw-vmm/api.sock");
        assert_eq!(a.args, b.args);
        assert_eq!(a.args[3], "fd={fd:0}");
        assert_eq!(a.args[4..], ["--seccomp", "true"]);
        // Ours may be set.
        assert_eq!(a.env["RUST_BACKTRACE"], "0");
        let mounts = [
            Mount::at("/run/thaw-vmm", Path::new("/run/a/vmm")),
            Mount::at("/run/thaw-kernel", Path::new("/data/elf")),
            Mount::at("/run/thaw-initrd", Path::new("/data/initrd")),
            Mount::disk(Path::new("/data/a")),
        ];
        assert_eq!(a.mounts, mounts);
        // Without capabilities it opens no tap device that is not its own.
        assert_eq!(a.tap_owner, Some((TAP.to_owned(), 7)));
        assert_eq!(a.user.map(|user| user.id), Some(7));
        assert_eq!((b.tap_owner, b.user), (None, None));
    }
}
