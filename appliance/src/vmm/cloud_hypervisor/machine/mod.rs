//! One Cloud Hypervisor: its process, its API, its events.
//!
//! ```text
//!   running ── stop: has all of its memory, vm.pause ──▶ stopped ── save: its guest is taken ─┐
//!      ▲                                                   │                                  ▼
//!      └────────────── go_on: vm.resume ◀──────────────────┴── its last answer ──────── held, stopped
//! ```
//!
//! Before anything that changes the guest it is asked whether it is there, and in which state.

mod boot;
mod restore;
mod taking;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;
use tokio::net::unix::pipe::Receiver;
use tokio::time::{Instant, sleep, timeout};
use uffd_engine::memory_image::{MemoryImage, Parts};
use uffd_engine::region::ClaimedRegion;

use super::bodies::{FromFile, VmInfo};
use super::command::{EVENT_MONITOR, Layout as Paths};
use super::events::Events;
use super::receive::Release;
use super::waiting::{Start, Waiting};
use super::{CloudHypervisor, StateError};
use crate::vmm::api::{Api, finish, judge};
use crate::vmm::console::Console;
use crate::vmm::exit::Exit;
use crate::vmm::memory::MemorySize;
use crate::vmm::process::{Survivor, VmmProcess, arguments_of, read_end};
use crate::vmm::{DiskLimits, Machine, Place, Saved, VmmError};
use taking::Taken;

const RUNNING: &str = "Running";
const PAUSED: &str = "Paused";
/// The thread that goes through all of a restored guest's memory; it ends when it has all of it.
const BRINGS_MEMORY: &str = "uffd-handler";
const MIGRATING: &str = "currently migrating";
const A_LITTLE: Duration = Duration::from_millis(5);

/// A running Cloud Hypervisor.
#[derive(Debug)]
pub(super) struct CloudHypervisorMachine {
    name: String,
    process: VmmProcess,
    events: Events,
    api: Api,
    paths: Paths,
    /// Who it is, if not the daemon's user.
    user: Option<u32>,
    memory: MemorySize,
    release: Release,
    from_file: FromFile,
    patience: Duration,
    taken: Option<Taken>,
    vmm_time: Duration,
    disk_limits: DiskLimits,
}

impl CloudHypervisorMachine {
    /// Starts the process and waits for its API.
    pub(super) async fn start(
        driver: &CloudHypervisor,
        start: Start<'_>,
        memory: MemorySize,
    ) -> Result<Self, VmmError> {
        let waiting = Waiting::start(driver, start).await?;
        let vmm_time = waiting.open.took;
        let limits = start.place.map(|place| place.disk_limits);
        let sizes = (memory, limits.unwrap_or_default());
        let machine = Self::over(driver, start.name, start.paths, sizes, waiting).await;
        machine.map(|machine| Self {
            vmm_time,
            ..machine
        })
    }

    /// Takes over a process whose API is open.
    pub(super) async fn over(
        driver: &CloudHypervisor,
        name: &str,
        paths: &Paths,
        (memory, disk_limits): (MemorySize, DiskLimits),
        waiting: Waiting,
    ) -> Result<Self, VmmError> {
        let failed = |source| VmmError::Start {
            name: name.to_owned(),
            source,
        };
        let Waiting {
            open,
            monitor,
            user,
        } = waiting;
        let process = open.process.watch().map_err(failed)?;
        let monitor = Receiver::from_owned_fd(monitor.into()).map_err(failed)?;
        let api = Api::new(paths.api(), open.api).await.map_err(failed)?;
        let parts = (process, monitor, api);
        let machine = Self::of(driver, name, paths, (memory, disk_limits), parts);
        Ok(Self {
            user,
            ..machine.map_err(failed)?
        })
    }

    /// Takes over a process that an earlier daemon started.
    pub(super) fn adopt(
        driver: &CloudHypervisor,
        memory: MemorySize,
        place: &Place,
        survivor: Survivor,
    ) -> Result<Self, VmmError> {
        let name = &place.name;
        let failed = |source| VmmError::adopting(name, source);
        let pid = survivor.pid;
        let process = VmmProcess::adopt(survivor, place.cgroup.clone()).map_err(failed)?;
        let monitor = monitor_of(pid).and_then(|descriptor| read_end(pid, descriptor));
        let paths = Paths::new(&place.run_dir);
        let api = Api::at(paths.api());
        let parts = (process, monitor.map_err(failed)?, api);
        let machine = Self::of(driver, name, &paths, (memory, place.disk_limits), parts);
        Ok(Self {
            user: driver.user(place.slot),
            ..machine.map_err(failed)?
        })
    }

    fn of(
        driver: &CloudHypervisor,
        name: &str,
        paths: &Paths,
        (memory, disk_limits): (MemorySize, DiskLimits),
        (process, monitor, api): (VmmProcess, Receiver, Api),
    ) -> io::Result<Self> {
        let pidfd = process.as_fd().try_clone_to_owned()?;
        Ok(Self {
            name: name.to_owned(),
            process,
            events: Events::listen(monitor, pidfd, name.to_owned()),
            api,
            paths: paths.clone(),
            user: None,
            memory,
            release: driver.release,
            from_file: driver.from_file,
            patience: driver.patience,
            taken: None,
            vmm_time: Duration::ZERO,
            disk_limits,
        })
    }

    /// Waits until it has all of its memory: until then, it lets nobody take its guest.
    async fn has_its_memory(&self) -> Result<(), VmmError> {
        let waiting = async {
            while !self.threads(BRINGS_MEMORY).is_empty() {
                sleep(A_LITTLE).await;
            }
        };
        let in_time = timeout(self.patience, waiting).await;
        in_time.map_err(|_| VmmError::Timeout {
            name: self.name.clone(),
            command: "bringing in all of its memory, without which it can't be saved".into(),
            seconds: self.patience.as_secs(),
        })
    }

    /// Its threads whose names begin like this; none when it has ended.
    fn threads(&self, name: &str) -> Vec<i32> {
        self.process.threads(name).unwrap_or_default()
    }

    /// Asks it whether it is there, and what its guest does.
    async fn guest_state(&mut self) -> Result<String, VmmError> {
        let asking = async {
            let said = self.api.get("/api/v1/vm.info").await?;
            let info: VmInfo = serde_json::from_slice(&said).map_err(io::Error::other)?;
            Ok(info.state)
        };
        let done = finish(&self.name, "vm.info", self.patience, asking).await;
        self.judge(done).await
    }

    pub(super) async fn order(&mut self, command: &str) -> Result<(), VmmError> {
        let path = format!("/api/v1/{command}");
        let began = Instant::now();
        let done = finish(&self.name, command, self.patience, self.api.order(&path)).await;
        self.vmm_time += began.elapsed();
        self.judge(done).await
    }

    async fn put(&mut self, command: &str, body: &impl Serialize) -> Result<(), VmmError> {
        let path = format!("/api/v1/{command}");
        let putting = self.api.put(&path, body);
        let began = Instant::now();
        let done = finish(&self.name, command, self.patience, putting).await;
        self.vmm_time += began.elapsed();
        self.judge(done).await
    }

    /// Says what ended it, if that is why; else what it printed, which has the reason.
    async fn judge<T>(&mut self, done: Result<T, VmmError>) -> Result<T, VmmError> {
        let judged = judge(&self.name, &mut self.process, done).await;
        let tail = || self.process.console().tail();
        judged.map_err(|error| match error {
            VmmError::Refused {
                name,
                command,
                answer,
            } => VmmError::Refused {
                name,
                command,
                answer: format!("{answer}; its console ends with: {}", tail()),
            },
            VmmError::Io {
                name,
                command,
                source,
            } => VmmError::Io {
                name,
                command,
                source: io::Error::new(
                    source.kind(),
                    format!("{source}; its console ends with: {}", tail()),
                ),
            },
            error => error,
        })
    }

    fn refused(&self, command: &str, answer: String) -> VmmError {
        VmmError::Refused {
            name: self.name.clone(),
            command: command.to_owned(),
            answer,
        }
    }

    fn state(&self, source: StateError) -> VmmError {
        VmmError::State {
            name: self.name.clone(),
            source,
        }
    }

    fn io(&self, command: &str, source: io::Error) -> VmmError {
        VmmError::Io {
            name: self.name.clone(),
            command: command.to_owned(),
            source,
        }
    }
}

#[async_trait]
impl Machine for CloudHypervisorMachine {
    async fn stop(&mut self) -> Result<(), VmmError> {
        match self.guest_state().await?.as_str() {
            PAUSED => return Ok(()),
            RUNNING => {}
            other => return Err(self.refused("vm.pause", format!("its guest is {other}"))),
        }
        // While it runs: this may take longer than anybody wants to be without it.
        self.has_its_memory().await?;
        self.order("vm.pause").await
    }

    async fn save(&mut self, _served: Option<&[ClaimedRegion]>) -> Result<Saved, VmmError> {
        let (state, parts) = self.take_guest().await?;
        let parts = Parts::new(parts, self.memory.page_size.bytes());
        let parts = parts.map_err(|source| self.io("looking into its memory", source))?;
        Ok(Saved {
            state,
            memory: MemoryImage::Parts(parts),
        })
    }

    async fn go_on(&mut self) -> Result<(), VmmError> {
        if let Some(Taken { held, asking }) = self.taken.take() {
            // If it has ended, what is asked next says so.
            let _ = held.let_go(self.release).await;
            // What older versions say of a guest that nobody took is no news.
            let _ = timeout(self.patience, asking).await;
        }
        if self.guest_state().await? == RUNNING {
            return Ok(());
        }
        let deadline = Instant::now() + self.patience;
        loop {
            match self.order("vm.resume").await {
                // The guest is on its way back from whoever was to send it.
                Err(VmmError::Refused { answer, .. })
                    if answer.contains(MIGRATING) && Instant::now() < deadline =>
                {
                    sleep(A_LITTLE).await;
                }
                done => return done,
            }
        }
    }

    /// Its API has no way to.
    async fn limit_disk(&mut self, _limits: DiskLimits) -> Result<(), VmmError> {
        Err(VmmError::NotWhileRunning {
            name: self.name.clone(),
            command: "change of its disk's limits".into(),
        })
    }

    async fn vcpu_threads(&mut self) -> Result<Vec<i32>, VmmError> {
        Ok(self.threads("vcpu"))
    }

    fn vmm_time(&self) -> Duration {
        self.vmm_time
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    fn exit(&mut self) -> Option<Exit> {
        let exit = self.process.exit()?;
        let console = self.process.console().text();
        Some(self.events.said().judge(exit, &console))
    }

    fn pid(&self) -> i32 {
        self.process.pid()
    }

    fn console(&self) -> Console {
        self.process.console().clone()
    }

    async fn kill(&mut self) {
        self.process.kill().await;
    }
}

/// The descriptor of a process that it reports its events to, as it was told.
fn monitor_of(pid: i32) -> io::Result<i32> {
    let mut arguments = arguments_of(pid)?.into_iter();
    let found = arguments
        .find(|argument| argument == EVENT_MONITOR)
        .and_then(|_| arguments.next()?.strip_prefix("fd=")?.parse().ok());
    found.ok_or_else(|| io::Error::other("it was not told where to report its events"))
}
