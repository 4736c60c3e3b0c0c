//! One Firecracker: its process and its API.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::Serialize;
use snapshot_format::PageCount;
use uffd_engine::memory_image::{MemoryImage, ProcessMemory};
use uffd_engine::region::{ClaimedRegion, RegionTable};

use super::bodies::{
    Action, Balloon, BootSource, Drive, Instance, MachineConfig, MemoryBackend, Metadata,
    MmdsConfig, NetworkInterface, NetworkOverride, PartialDrive, SnapshotCreate, SnapshotLoad,
    VmState, Vsock,
};
use super::command::{ALIAS, HANDOFF, Layout, Parts, SOCKET, STATE, VSOCK_PATH};
use super::saving::{Saving, Trust};
use super::{Firecracker, Options, StateOnly};
use crate::network::address::{GATEWAY, GUEST, GUEST_MAC, GUEST_PREFIX, TAP};
use crate::vmm::api::{Api, finish, judge};
use crate::vmm::console::Console;
use crate::vmm::exit::Exit;
use crate::vmm::launch::DISK_PATH;
use crate::vmm::opening::{self, Open};
use crate::vmm::process::{Survivor, VmmProcess};
use crate::vmm::rate_limiter::RateLimiter;
use crate::vmm::{DiskLimits, GuestShape, Machine, Place, Restore, Saved, VmmError};

const DISK: &str = "rootfs";
const LINK: &str = "eth0";
/// Source: vsock(7).
const FIRST_CID: u32 = 3;
/// Nothing can be written here: the directory isn't there.
const NOWHERE: &str = "nowhere/memory";
/// What Firecracker says of a memory file that it can't open.
const OF_THE_MEMORY_FILE: &str = "memory";

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

    /// A guest from its kernel. Without a place it has neither disk nor network.
    pub(super) async fn boot(
        &mut self,
        shape: &GuestShape,
        kernel: &Path,
        place: Option<(&Place, Options)>,
        free_page_reporting: bool,
    ) -> Result<(), VmmError> {
        let machine = MachineConfig {
            vcpu_count: shape.vcpus,
            mem_size_mib: shape.memory_mb,
            smt: false,
            huge_pages: shape.huge_pages.then_some("2M"),
        };
        self.put("/machine-config", &machine).await?;
        let network = place
            .map(|_| format!(" thaw.ip={GUEST}/{GUEST_PREFIX} thaw.gw={GATEWAY}"))
            .unwrap_or_default();
        let cmdline = &shape.cmdline;
        let boot = BootSource {
            kernel_image_path: self.layout.kernel(kernel).to_owned(),
            initrd_path: place.map(|_| self.layout.initrd(&shape.initrd).to_owned()),
            boot_args: format!("console=ttyS0 reboot=k panic=-1{network} {cmdline}"),
        };
        self.put("/boot-source", &boot).await?;
        if let Some((place, options)) = place {
            self.add_devices(place, options, free_page_reporting)
                .await?;
        }
        let start = Action {
            action_type: "InstanceStart",
        };
        self.put("/actions", &start).await
    }

    async fn add_devices(
        &mut self,
        place: &Place,
        options: Options,
        free_page_reporting: bool,
    ) -> Result<(), VmmError> {
        let drive = Drive {
            drive_id: DISK,
            path_on_host: DISK_PATH.into(),
            // The initial RAM disk mounts it.
            is_root_device: false,
            is_read_only: false,
            cache_type: "Writeback",
            io_engine: "Sync",
            rate_limiter: RateLimiter::of(place.disk_limits),
        };
        self.put(&format!("/drives/{DISK}"), &drive).await?;
        let link = NetworkInterface {
            iface_id: LINK,
            host_dev_name: TAP,
            guest_mac: GUEST_MAC,
        };
        self.put(&format!("/network-interfaces/{LINK}"), &link)
            .await?;
        let balloon = Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            free_page_reporting,
        };
        self.put("/balloon", &balloon).await?;
        if options.vsock {
            let vsock = Vsock {
                // Those of others don't matter to it; below are those that mean something.
                guest_cid: place.slot.saturating_add(FIRST_CID),
                uds_path: VSOCK_PATH,
            };
            self.put("/vsock", &vsock).await?;
        }
        let config = MmdsConfig {
            version: "V2",
            network_interfaces: [LINK],
        };
        self.put("/mmds/config", &config).await?;
        self.introduce(place).await
    }

    /// What the guest may ask for; a device state doesn't hold it.
    async fn introduce(&mut self, place: &Place) -> Result<(), VmmError> {
        let metadata = Metadata {
            sandbox_id: place.name.clone(),
            template_id: place.template.clone(),
        };
        self.put("/mmds", &metadata).await
    }

    /// A guest from the device state that lies in its directory.
    pub(super) async fn load(
        &mut self,
        memory: MemorySource,
        place: Option<&Place>,
        run: bool,
    ) -> Result<(), VmmError> {
        if let Some(place) = place {
            self.introduce(place).await?;
        }
        let (backend_type, file) = match memory {
            MemorySource::Served => ("Uffd", HANDOFF),
            MemorySource::File(name) => ("File", name),
        };
        let network = place.map(|_| NetworkOverride {
            iface_id: LINK,
            host_dev_name: TAP,
        });
        let load = SnapshotLoad {
            snapshot_path: self.layout.inside(STATE),
            mem_backend: MemoryBackend {
                backend_type,
                backend_path: self.layout.inside(file),
            },
            resume_vm: run,
            network_overrides: network.into_iter().collect(),
        };
        self.put("/snapshot/load", &load).await
    }

    /// A sandbox's guest from the device state that lies in its directory, which goes then.
    pub(super) async fn restore(
        &mut self,
        place: &Place,
        restore: &Restore<'_>,
    ) -> Result<(), VmmError> {
        self.load(MemorySource::Served, Some(place), restore.run)
            .await?;
        self.limit_restored_disk(place, restore.had_disk_limits)
            .await?;
        let _ = fs::remove_file(self.layout.state());
        Ok(())
    }

    /// Gives the disk of a guest that was loaded today's limits; its state has those that it ran with.
    async fn limit_restored_disk(&mut self, place: &Place, had_some: bool) -> Result<(), VmmError> {
        if !had_some && place.disk_limits == DiskLimits::default() {
            return Ok(());
        }
        self.set_disk_limits(place.disk_limits).await
    }

    async fn set_disk_limits(&mut self, limits: DiskLimits) -> Result<(), VmmError> {
        let drive = PartialDrive {
            drive_id: DISK,
            rate_limiter: RateLimiter::instead(limits),
        };
        self.patch(&format!("/drives/{DISK}"), &drive).await
    }

    /// The device state alone: it is written before the memory's file is opened, so a memory
    /// file that can't be is an error that comes after all that is wanted. No documentation says
    /// so, which is why it is tried out at start.
    pub(super) async fn save_state_only(&mut self) -> Result<Vec<u8>, VmmError> {
        let file = "state";
        let create = SnapshotCreate {
            // Should a file be opened after all, this one reads no page that isn't there.
            snapshot_type: "Diff",
            snapshot_path: self.layout.saved(file),
            mem_file_path: self.layout.saved(NOWHERE),
        };
        match self.put("/snapshot/create", &create).await {
            Err(VmmError::Refused { answer, .. }) if answer.contains(OF_THE_MEMORY_FILE) => {}
            Err(error) => return Err(error),
            Ok(()) => {
                return Err(VmmError::Refused {
                    name: self.name.clone(),
                    command: "saving its state".into(),
                    answer: "it wrote memory to where nothing can be".into(),
                });
            }
        }
        self.take_saved(file)
    }

    /// The device state, and the pages that are in memory. Bringing in others, as a full
    /// snapshot would, is what a lazily restored guest is to be spared.
    async fn save_with_memory(&mut self, kind: &'static str) -> Result<Saved, VmmError> {
        let lent = i64::try_from(self.memory_bytes).unwrap_or(i64::MAX);
        self.lend_memory(lent)
            .map_err(|source| self.io("making room for its memory", source))?;
        let create = SnapshotCreate {
            snapshot_type: kind,
            snapshot_path: self.layout.saved("state"),
            mem_file_path: self.layout.saved("memory"),
        };
        self.put("/snapshot/create", &create).await?;
        let state = self.take_saved("state")?;
        let path = self.layout.saved_by(self.process.pid(), "memory");
        // Held open and without a name: it goes with its reader.
        let memory = File::open(&path)
            .and_then(|file| fs::remove_file(&path).map(|()| file))
            .map_err(|source| self.io("reading the memory it saved", source))?;
        Ok(Saved {
            state,
            memory: MemoryImage::File(memory),
        })
    }

    /// Changes what its control group may have to so much more than it needs when it runs. What is
    /// saved counts until its reader lets go of it.
    fn lend_memory(&mut self, bytes: i64) -> io::Result<()> {
        let (Some(cgroup), more) = (self.process.cgroup(), bytes - self.lent_bytes) else {
            return Ok(());
        };
        if more != 0 {
            cgroup.change_memory(more)?;
            self.lent_bytes = bytes;
        }
        Ok(())
    }

    fn take_saved(&self, name: &str) -> Result<Vec<u8>, VmmError> {
        let path = self.layout.saved_by(self.process.pid(), name);
        let bytes = fs::read(&path).and_then(|bytes| fs::remove_file(&path).map(|()| bytes));
        let bytes = bytes.map_err(|source| self.io("reading the state it saved", source))?;
        if bytes.is_empty() {
            let source = io::Error::other("the file is empty");
            return Err(self.io("reading the state it saved", source));
        }
        Ok(bytes)
    }

    fn process_memory(&self, served: &[ClaimedRegion]) -> Result<MemoryImage, VmmError> {
        // It was checked when it was handed over.
        let page = served.first().map_or(1, |region| region.page_size);
        let pages = PageCount::new(self.memory_bytes / page);
        let regions = RegionTable::new(served, page, pages).map_err(io::Error::other);
        regions
            .and_then(|regions| ProcessMemory::open(self.process.pid(), regions))
            .map(MemoryImage::Process)
            .map_err(|source| self.io("looking into its memory", source))
    }

    fn io(&self, command: &str, source: io::Error) -> VmmError {
        VmmError::Io {
            name: self.name.clone(),
            command: command.to_owned(),
            source,
        }
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

/// Where the pages of a loaded guest come from.
#[derive(Clone, Copy, Debug)]
pub(super) enum MemorySource {
    /// Whoever listens in its directory.
    Served,
    /// A file there.
    File(&'static str),
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
        let tasks = PathBuf::from(format!("/proc/{}/task", self.process.pid()));
        let entries = fs::read_dir(&tasks).map_err(|source| self.io("naming its vCPUs", source))?;
        let is_vcpu = |thread: &i32| {
            let name = fs::read_to_string(tasks.join(thread.to_string()).join("comm"));
            name.is_ok_and(|name| name.starts_with("fc_vcpu"))
        };
        Ok(entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(is_vcpu)
            .collect())
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

/// Puts the device state to load where the VMM looks for it.
pub(super) fn write_state(layout: &Layout, state: &[u8]) -> io::Result<()> {
    fs::write(layout.state(), state)
}
