//! VMMs that wait for sandboxes, in the slots that wait: a thread that starts them and takes them
//! down, and the handle from which a restore claims one without waiting for that thread.
//!
//! ```text
//!   slot waits ─▶ started ─▶ waits ─▶ claimed by the restore that has the slot: its directory
//!                              │      gets the sandbox's name
//!                              ├─▶ ended: the slot is taken down, or boots a guest
//!                              └─▶ died: replaced
//! ```
//!
//! None is handed out that has ended, or that sits in a namespace which is no longer its slot's. After
//! a daemon's sudden end they are found in the namespaces of its slots, as all VMMs are.

mod keeper;
mod plan;
mod waiting;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::Notify;

use super::Driver;
use super::cgroup::{Cgroup, Cgroups};
use super::prepared::Prepared;
use crate::host::remove_dir;
use crate::network::{Slot, SlotIndex, Slots};
use keeper::Keeper;
use waiting::{Waiting, discard, end, has_ended, identity};

/// The directory of their directories, in the daemon's.
pub const DIRECTORY: &str = "ready";

/// What became of VMMs that waited, for metrics.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Restores that found one.
    pub claimed: Counter,
    /// Restores that found none.
    pub missing: Counter,
    /// Those that died, or whose slot was another by then.
    pub lost: Counter,
}

/// One that was claimed.
pub struct Claimed {
    /// The VMM.
    pub prepared: Box<dyn Prepared>,
    /// The control group that it is in, without limits.
    pub cgroup: Option<Cgroup>,
}

/// A handle to them.
#[derive(Clone)]
pub struct ReadyVmms {
    inner: Arc<Inner>,
}

struct Inner {
    driver: Arc<dyn Driver>,
    cgroups: Option<Cgroups>,
    /// Each of them has a directory here, with a number that no other gets.
    dir: PathBuf,
    limit: usize,
    waiting: Mutex<BTreeMap<SlotIndex, Waiting>>,
    counts: Counts,
    closing: AtomicBool,
    closed: Notify,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Inner {
    fn new(
        (driver, cgroups): (Arc<dyn Driver>, Option<Cgroups>),
        dir: PathBuf,
        limit: usize,
        counts: Counts,
    ) -> Self {
        let limit = driver.prepares().map_or(0, |_| limit);
        Self {
            driver,
            cgroups,
            dir,
            limit,
            waiting: Mutex::default(),
            counts,
            closing: AtomicBool::new(false),
            closed: Notify::new(),
            thread: Mutex::default(),
        }
    }
}

impl ReadyVmms {
    /// From now on keeps a VMM of this driver in each slot that waits: in so many of those for
    /// new sandboxes, and in as many of those that paused ones gave back. If the driver's don't
    /// wait, there are none, and nobody misses any.
    ///
    /// # Errors
    /// The directory or the thread can't be made.
    pub fn start(
        (driver, cgroups): (Arc<dyn Driver>, Option<Cgroups>),
        slots: Slots,
        run_dir: &Path,
        limit: usize,
        counts: Counts,
    ) -> io::Result<Self> {
        let dir = run_dir.join(DIRECTORY);
        let inner = Arc::new(Inner::new((driver, cgroups), dir, limit, counts));
        if inner.limit > 0 {
            fs::create_dir_all(&inner.dir)?;
            let keeper = Keeper {
                inner: inner.clone(),
                slots,
                number: 0,
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let thread = std::thread::Builder::new().name("ready-vmms".into());
            let thread = thread.spawn(move || runtime.block_on(keeper.run()))?;
            *inner.thread.lock() = Some(thread);
        }
        Ok(Self { inner })
    }

    /// How many wait.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.inner.waiting.lock().len()
    }

    /// The VMM that waits in a slot which its sandbox has taken, if this driver can restore with
    /// it; its directory is `run_dir` then, which has to be empty.
    #[must_use]
    pub fn claim(&self, slot: &Slot, driver: &Arc<dyn Driver>, run_dir: &Path) -> Option<Claimed> {
        let inner = &self.inner;
        if inner.limit == 0 {
            return None;
        }
        let Some(waiting) = inner.waiting.lock().remove(&slot.index) else {
            inner.counts.missing.inc();
            return None;
        };
        let problem = if !std::ptr::addr_eq(Arc::as_ptr(driver), Arc::as_ptr(&inner.driver)) {
            Some("the build needs another VMM")
        } else if has_ended(waiting.prepared.pidfd()) {
            Some("it has ended")
        } else if identity(&slot.namespace).ok() != Some(waiting.namespace) {
            Some("its slot is another now")
        } else if fs::rename(&waiting.dir, run_dir).is_err() {
            Some("its directory can't be moved")
        } else {
            None
        };
        match problem {
            None => {
                inner.counts.claimed.inc();
                Some(Claimed {
                    prepared: waiting.prepared,
                    cgroup: waiting.cgroup,
                })
            }
            Some(problem) => {
                tracing::warn!(slot = slot.index.0, problem, "A waiting VMM is of no use");
                inner.counts.lost.inc();
                discard(waiting);
                None
            }
        }
    }

    /// Ends the VMM that waits in a slot, because something else is to run there.
    pub fn dismiss(&self, slot: SlotIndex) {
        let waiting = self.inner.waiting.lock().remove(&slot);
        if let Some(waiting) = waiting {
            discard(waiting);
        }
    }

    /// None is started any more; those that wait stay.
    pub fn close(&self) {
        self.inner.closing.store(true, Ordering::Release);
        self.inner.closed.notify_one();
    }

    /// Ends those that wait, and the thread.
    pub fn end(&self) {
        self.close();
        let thread = self.inner.thread.lock().take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::warn!("The thread of waiting VMMs panicked");
        }
        let waiting = std::mem::take(&mut *self.inner.waiting.lock());
        for (_, waiting) in waiting {
            end(waiting);
        }
        remove_dir(&self.inner.dir);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::process::{Child, Command, Stdio};

    use async_trait::async_trait;
    use http_api::wire::VmmInfo;
    use uffd_engine::Tracking;
    use uffd_engine::sys::process::pidfd_open;

    use super::*;
    use crate::vmm::prepared::{Berth, Prepares};
    use crate::vmm::process::Survivor;
    use crate::vmm::{GuestShape, Machine, Place, Restore, VmmError};

    struct Nothing {
        info: VmmInfo,
        waits: bool,
    }

    fn refusal() -> VmmError {
        VmmError::Ended {
            name: "a test's".into(),
            console: String::new(),
        }
    }

    #[async_trait]
    impl Driver for Nothing {
        fn info(&self) -> &VmmInfo {
            &self.info
        }
        fn state_format(&self) -> &str {
            "0"
        }
        fn tracking(&self) -> Tracking {
            Tracking::Off
        }
        fn handoff(&self, place: &Place) -> io::Result<PathBuf> {
            Ok(place.run_dir.clone())
        }
        async fn boot(&self, _: &GuestShape, _: &Place) -> Result<Box<dyn Machine>, VmmError> {
            Err(refusal())
        }
        async fn restore(
            &self,
            _: &GuestShape,
            _: &Place,
            _: Restore<'_>,
        ) -> Result<Box<dyn Machine>, VmmError> {
            Err(refusal())
        }
        async fn adopt(
            &self,
            _: &GuestShape,
            _: &Place,
            _: Survivor,
        ) -> Result<Box<dyn Machine>, VmmError> {
            Err(refusal())
        }
        fn prepares(&self) -> Option<&dyn Prepares> {
            self.waits.then_some(self)
        }
    }

    #[async_trait]
    impl Prepares for Nothing {
        async fn prepare(&self, _: &Berth) -> Result<Box<dyn Prepared>, VmmError> {
            Err(refusal())
        }
    }

    fn driver(waits: bool) -> Arc<dyn Driver> {
        let info = VmmInfo {
            name: "nothing".into(),
            version: "0".into(),
            accelerator: "none".into(),
            reason: String::new(),
        };
        Arc::new(Nothing { info, waits })
    }

    fn nothing() -> Arc<dyn Driver> {
        driver(true)
    }

    struct Sleeper {
        child: Child,
        pidfd: OwnedFd,
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }

    #[async_trait]
    impl Prepared for Sleeper {
        fn pidfd(&self) -> BorrowedFd<'_> {
            self.pidfd.as_fd()
        }
        async fn restore(
            self: Box<Self>,
            _: &GuestShape,
            _: &Place,
            _: Restore<'_>,
        ) -> Result<Box<dyn Machine>, VmmError> {
            Err(refusal())
        }
    }

    /// A pool without its thread, and a slot in which one waits.
    struct Subject {
        ready: ReadyVmms,
        slot: Slot,
        pid: u32,
        dir: tempfile::TempDir,
    }

    fn waiting(driver: &Arc<dyn Driver>) -> Subject {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("ready/1")).unwrap();
        fs::create_dir(path("sandbox")).unwrap();
        fs::write(path("ready/1/socket"), "").unwrap();
        fs::write(path("namespace"), "").unwrap();
        let mut sleep = Command::new("sleep");
        let child = sleep.arg("600").stdin(Stdio::null()).spawn().unwrap();
        let (pid, pidfd) = (child.id(), pidfd_open(child.id() as i32).unwrap());
        let one = Waiting {
            prepared: Box::new(Sleeper { child, pidfd }),
            cgroup: None,
            namespace: identity(&path("namespace")).unwrap(),
            dir: path("ready/1"),
        };
        let of = (driver.clone(), None);
        let inner = Inner::new(of, path("ready"), 1, Counts::default());
        inner.waiting.lock().insert(SlotIndex(7), one);
        Subject {
            ready: ReadyVmms {
                inner: Arc::new(inner),
            },
            slot: Slot {
                index: SlotIndex(7),
                namespace: path("namespace"),
                address: std::net::Ipv4Addr::LOCALHOST,
            },
            pid,
            dir,
        }
    }

    impl Subject {
        fn claim(&self, driver: &Arc<dyn Driver>) -> Option<Claimed> {
            let run_dir = self.dir.path().join("sandbox");
            self.ready.claim(&self.slot, driver, &run_dir)
        }

        fn counts(&self) -> [u64; 3] {
            let counts = &self.ready.inner.counts;
            [&counts.claimed, &counts.missing, &counts.lost].map(Counter::get)
        }

        /// What was of no use goes, off the thread that found it out.
        fn is_gone(&self) {
            let proc = PathBuf::from(format!("/proc/{}", self.pid));
            while proc.exists() || self.dir.path().join("ready/1").exists() {
                std::thread::yield_now();
            }
        }
    }

    #[tokio::test]
    async fn one_is_claimed_once_and_its_directory_gets_the_sandboxs_name() {
        let driver = nothing();
        let subject = waiting(&driver);
        assert!(subject.claim(&driver).is_some());
        assert!(subject.dir.path().join("sandbox/socket").exists());
        assert!(!subject.dir.path().join("ready/1").exists());
        assert!(subject.claim(&driver).is_none());
        assert_eq!(subject.counts(), [1, 1, 0]);
    }

    #[tokio::test]
    async fn nobody_misses_one_of_a_driver_whose_dont_wait() {
        let driver = driver(false);
        let subject = waiting(&driver);
        subject.ready.dismiss(SlotIndex(7));
        assert!(subject.claim(&driver).is_none());
        subject.is_gone();
        assert_eq!(subject.counts(), [0, 0, 0]);
    }

    #[tokio::test]
    async fn one_in_a_namespace_that_was_made_anew_is_handed_to_nobody() {
        let driver = nothing();
        let subject = waiting(&driver);
        let new = subject.dir.path().join("new");
        fs::write(&new, "").unwrap();
        fs::rename(&new, &subject.slot.namespace).unwrap();
        assert!(subject.claim(&driver).is_none());
        subject.is_gone();
        assert_eq!(subject.counts(), [0, 0, 1]);
    }

    #[tokio::test]
    async fn one_that_has_ended_is_handed_to_nobody() {
        let driver = nothing();
        let subject = waiting(&driver);
        let pid = nix::unistd::Pid::from_raw(subject.pid as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        {
            let waiting = subject.ready.inner.waiting.lock();
            let pidfd = waiting[&SlotIndex(7)].prepared.pidfd();
            while !has_ended(pidfd) {
                std::thread::yield_now();
            }
        }
        assert!(subject.claim(&driver).is_none());
        subject.is_gone();
        assert_eq!(subject.counts(), [0, 0, 1]);
    }

    #[tokio::test]
    async fn one_of_another_driver_is_handed_to_nobody() {
        let driver = nothing();
        let subject = waiting(&driver);
        assert!(subject.claim(&nothing()).is_none());
        subject.is_gone();
        assert_eq!(subject.counts(), [0, 0, 1]);
    }
}
