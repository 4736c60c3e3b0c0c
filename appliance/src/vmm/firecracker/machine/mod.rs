//! One Firecracker: its process and its API.

mod boot;
mod restore;
mod save;

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::Serialize;
use uffd_engine::region::ClaimedRegion;

use super::bodies::{Instance, PartialDrive, VmState};
use super::command::{ALIAS, HANDOFF, Layout, Parts, SOCKET, STATE};
use super::saving::{Saving, Trust};
use super::{Firecracker, StateOnly};
use crate::vmm::api::{Api, finish, judge};
use crate::vmm::console::Console;
use crate::vmm::exit::Exit;
use crate::vmm::opening::{self, Open};
use crate::vmm::process::{Survivor, VmmProcess};
use crate::vmm::rate_limiter::RateLimiter;
use crate::vmm::{DiskLimits, Machine, Place, Saved, VmmError};

pub(super) use restore::{MemorySource, write_state};

const DISK: &str = "rootfs";
const LINK: &str = "eth0";

/// A running Firecracker.
#[derive(Debug)]
pub(super) struct FirecrackerMachine {
    name: String,
    process: VmmProcess,
    api: Api,
    layout: Layout,
    memory_bytes: u64,
    state_only: bool,
    misplaces: bool,
    patience: Duration,
    /// More memory than its control group had before, for what it saves to memory.
    lent_bytes: i64,
    vmm_time: Duration,
}

/// Starts the process and waits for its API.
pub(super) async fn open(
    driver: &Firecracker,
    name: &str,
    layout: &Layout,
    parts: &Parts<'_>,
) -> Result<Open, VmmError> {
    let failed = |source| VmmError::Start {
        name: name.to_owned(),
        source,
    };
    make_dir(layout).map_err(failed)?;
    if let (Some(disk), true) = (parts.disk, layout.user != 0) {
        chown(disk, Some(layout.user), Some(layout.user)).map_err(failed)?;
    }
    let launch = layout.launch(&driver.program, driver.jailer.as_ref(), parts);
    let socket = layout.dir.join(SOCKET);
    opening::open(name, (&launch, &[]), &socket, driver.patience).await
}

impl FirecrackerMachine {
    /// Starts the process and waits for its API.
    pub(super) async fn start(
        driver: &Firecracker,
        name: &str,
        layout: Layout,
        parts: &Parts<'_>,
    ) -> Result<Self, VmmError> {
        let open = open(driver, name, &layout, parts).await?;
        let vmm_time = open.took;
        let machine = Self::over(driver, name, layout, parts.memory_bytes, open).await;
        machine.map(|machine| Self {
            vmm_time,
            ..machine
        })
    }

    /// Takes over a process whose API is open.
    pub(super) async fn over(
        driver: &Firecracker,
        name: &str,
        layout: Layout,
        memory_bytes: u64,
        open: Open,
    ) -> Result<Self, VmmError> {
        let failed = |source| VmmError::Start {
            name: name.to_owned(),
            source,
        };
        let process = open.process.watch().map_err(failed)?;
        let socket = layout.dir.join(SOCKET);
        let api = Api::new(socket, open.api).await.map_err(failed)?;
        Ok(Self::of(driver, name, layout, memory_bytes, (process, api)))
    }

    /// Takes over a process that an earlier daemon started.
    pub(super) fn adopt(
        driver: &Firecracker,
        place: &Place,
        layout: Layout,
        memory_bytes: u64,
        survivor: Survivor,
    ) -> Result<Self, VmmError> {
        let name = &place.name;
        let adopted = VmmProcess::adopt(survivor, place.cgroup.clone());
        let process = adopted.map_err(|source| VmmError::adopting(name, source))?;
        let api = Api::at(layout.dir.join(SOCKET));
        Ok(Self::of(driver, name, layout, memory_bytes, (process, api)))
    }

    fn of(
        driver: &Firecracker,
        name: &str,
        layout: Layout,
        memory_bytes: u64,
        (process, api): (VmmProcess, Api),
    ) -> Self {
        Self {
            name: name.to_owned(),
            process,
            api,
            layout,
            memory_bytes,
            state_only: driver.state_only == StateOnly::Works,
            misplaces: driver.misplaces,
            patience: driver.patience,
            lent_bytes: 0,
            vmm_time: Duration::ZERO,
        }
    }

    /// Lets the guest run if it is stopped.
    pub(super) async fn ensure_running(&mut self) -> Result<(), VmmError> {
        let asking = async {
            let said = self.api.get("/").await?;
            let instance: Instance = serde_json::from_slice(&said).map_err(io::Error::other)?;
            Ok(instance.state)
        };
        let asked = finish(&self.name, "GET /", self.patience, asking).await;
        match self.judge(asked).await?.as_str() {
            "Running" => Ok(()),
            "Paused" => self.go_on().await,
            other => Err(VmmError::Refused {
                name: self.name.clone(),
                command: "going on".into(),
                answer: format!("its guest is {other:?}"),
            }),
        }
    }

    fn io(&self, command: &str, source: io::Error) -> VmmError {
        VmmError::Io {
            name: self.name.clone(),
            command: command.to_owned(),
            source,
        }
    }

    async fn set_disk_limits(&mut self, limits: DiskLimits) -> Result<(), VmmError> {
        let drive = PartialDrive {
            drive_id: DISK,
            rate_limiter: RateLimiter::instead(limits),
        };
        self.patch(&format!("/drives/{DISK}"), &drive).await
    }

    async fn put(&mut self, path: &str, body: &impl Serialize) -> Result<(), VmmError> {
        let what = format!("PUT {path}");
        let (putting, began) = (self.api.put(path, body), Instant::now());
        let done = finish(&self.name, &what, self.patience, putting).await;
        self.vmm_time += began.elapsed();
        self.judge(done).await
    }

    async fn change(&mut self, state: &'static str) -> Result<(), VmmError> {
        self.patch("/vm", &VmState { state }).await
    }

    async fn patch(&mut self, path: &str, body: &impl Serialize) -> Result<(), VmmError> {
        let what = format!("PATCH {path}");
        let (patching, began) = (self.api.patch(path, body), Instant::now());
        let done = finish(&self.name, &what, self.patience, patching).await;
        self.vmm_time += began.elapsed();
        self.judge(done).await
    }

    async fn judge<T>(&mut self, done: Result<T, VmmError>) -> Result<T, VmmError> {
        judge(&self.name, &mut self.process, done).await
    }
}

#[async_trait]
impl Machine for FirecrackerMachine {
    async fn stop(&mut self) -> Result<(), VmmError> {
        self.change("Paused").await
    }

    async fn save(&mut self, served: Option<&[ClaimedRegion]>) -> Result<Saved, VmmError> {
        let trust = Trust::now(self.misplaces);
        let how = trust.saving(served.is_some(), self.state_only, self.memory_bytes);
        match (how, served) {
            (Ok(Saving::State), Some(served)) => {
                let state = self.save_state_only().await?;
                let memory = self.process_memory(served)?;
                Ok(Saved { state, memory })
            }
            (Ok(Saving::All), _) => self.save_with_memory("Full").await,
            (Ok(_), _) => self.save_with_memory("Diff").await,
            (Err(reason), _) => Err(VmmError::Refused {
                name: self.name.clone(),
                command: "saving its memory".into(),
                answer: reason.into(),
            }),
        }
    }

    async fn go_on(&mut self) -> Result<(), VmmError> {
        if let Err(error) = self.lend_memory(0) {
            tracing::warn!(name = self.name, %error, "Its control group may take more than it should");
        }
        self.change("Resumed").await
    }

    async fn limit_disk(&mut self, limits: DiskLimits) -> Result<(), VmmError> {
        self.set_disk_limits(limits).await
    }

    async fn vcpu_threads(&mut self) -> Result<Vec<i32>, VmmError> {
        let threads = self.process.threads("fc_vcpu");
        threads.map_err(|source| self.io("naming its vCPUs", source))
    }

    fn vmm_time(&self) -> Duration {
        self.vmm_time
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    fn exit(&mut self) -> Option<Exit> {
        self.process.exit()
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

/// The directory that host and VMM share. Its socket for hand-offs may be in it already.
pub(super) fn make_dir(layout: &Layout) -> io::Result<()> {
    fs::create_dir_all(&layout.dir)?;
    if layout.user != 0 {
        // A jail's /run is this directory.
        match symlink(".", layout.dir.join(ALIAS)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        fs::set_permissions(&layout.dir, Permissions::from_mode(0o700))?;
        for path in [
            layout.dir.clone(),
            layout.dir.join(HANDOFF),
            layout.dir.join(STATE),
        ] {
            match chown(&path, Some(layout.user), Some(layout.user)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}
