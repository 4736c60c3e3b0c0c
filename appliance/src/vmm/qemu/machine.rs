//! One QEMU: its process, its control socket, its RAM.

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use snapshot_format::{PageCount, PageSize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use uffd_engine::memory_image::{MemoryImage, ProcessMemory};
use uffd_engine::region::{ClaimedRegion, RegionTable};

use super::command::{self, Start};
use super::qmp::{Qmp, QmpError};
use super::{HANDOFF, Qemu};
use crate::vmm::console::Console;
use crate::vmm::exit::Exit;
use crate::vmm::own_user::{give, make_dir};
use crate::vmm::process::{Survivor, VmmProcess, arguments_of};
use crate::vmm::{COMMAND_TIMEOUT, DiskLimits, GuestShape, Machine, Place, Saved, VmmError};

/// Its control socket, in the directory of its sandbox.
const CONTROL: &str = "qmp.sock";

/// A running QEMU.
#[derive(Debug)]
pub struct QemuMachine {
    name: String,
    process: VmmProcess,
    qmp: Qmp,
    ram: File,
    /// What it was waited for so far.
    vmm_time: Duration,
}

impl QemuMachine {
    /// Starts QEMU and connects to it. The guest boots and runs at once; or, to be `restored`, its
    /// memory is served by whoever listens in its directory, and a device state is awaited.
    pub(super) async fn start(
        driver: &Qemu,
        shape: &GuestShape,
        place: &Place,
        restored: bool,
    ) -> Result<Self, VmmError> {
        let failed = |source| VmmError::Start {
            name: place.name.clone(),
            source,
        };
        let ram = shape.memory().file().map_err(failed)?;
        let metadata = ram.metadata().map_err(failed)?;
        let ram_inode = format!("{}:{}", metadata.dev(), metadata.ino());
        let start = if restored {
            Start::Restore {
                preload: &driver.preload,
                ram_inode: &ram_inode,
            }
        } else {
            Start::Boot
        };
        let (dir, user) = (super::dir(place), driver.users);
        let user = user.map(|users| users.of(place.slot));
        make_dir(&dir, user).map_err(failed)?;
        if let Some(user) = user {
            for path in [&dir.join(HANDOFF), &place.disk] {
                give(path, user).map_err(failed)?;
            }
        }
        let launch = command::launch(&driver.program, driver.accelerator, shape, place, start);
        let launch = command::as_user(launch, driver.accelerator, user);
        let launch = command::with_disk_limits(launch, place.disk_limits);
        // Bound before QEMU runs, so that connecting needs no polling.
        let socket = place.run_dir.join(CONTROL);
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(failed)?;
        let fds = [ram.as_fd(), listener.as_fd()];
        let process = VmmProcess::start(&launch, &fds).await.map_err(failed)?;
        drop(listener);
        Self::over(place, process, ram).await
    }

    /// Takes over a process that an earlier daemon started.
    pub(super) async fn adopt(place: &Place, survivor: Survivor) -> Result<Self, VmmError> {
        let failed = |source| VmmError::adopting(&place.name, source);
        let pid = survivor.pid;
        let process = VmmProcess::adopt(survivor, place.cgroup.clone()).map_err(failed)?;
        Self::over(place, process, ram_of(pid).map_err(failed)?).await
    }

    /// Lets the guest run if it is stopped; soon, if its state is on its way to nobody.
    pub(super) async fn ensure_running(&mut self) -> Result<(), VmmError> {
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        loop {
            match self.go_on().await {
                Err(VmmError::Refused { .. }) if Instant::now() < deadline => {
                    sleep(Duration::from_millis(20)).await;
                }
                done => return done,
            }
        }
    }

    /// Connects to a process.
    async fn over(place: &Place, process: VmmProcess, ram: File) -> Result<Self, VmmError> {
        let (began, socket) = (Instant::now(), place.run_dir.join(CONTROL));
        let greeting = async {
            let stream = UnixStream::connect(&socket).await?;
            Qmp::greet(stream).await
        };
        let qmp = finish(&place.name, "the greeting", process.console(), greeting).await?;
        let mut machine = Self {
            name: place.name.clone(),
            process,
            qmp,
            ram,
            vmm_time: began.elapsed(),
        };
        machine.configure_migration().await?;
        Ok(machine)
    }

    /// The RAM is a shared file that outlives the stream: only devices are migrated.
    async fn configure_migration(&mut self) -> Result<(), VmmError> {
        let on = |capability| json!({ "capability": capability, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        self.run("migrate-set-capabilities", capabilities).await?;
        self.run(
            "migrate-set-parameters",
            json!({ "max-bandwidth": 1u64 << 40 }),
        )
        .await
    }

    /// Loads a device state; the guest is stopped after it.
    pub(super) async fn load(&mut self, state: Vec<u8>) -> Result<(), VmmError> {
        let console = self.process.console().clone();
        let name = self.name.clone();
        let loading = async {
            let (mut ours, theirs) = UnixStream::pair()?;
            self.lend("state", &theirs).await?;
            drop(theirs);
            self.qmp
                .execute("migrate-incoming", json!({ "uri": "fd:state" }))
                .await?;
            let feeding = async {
                // A QEMU that gives up closes its end; its event says why.
                let _ = ours.write_all(&state).await;
                drop(ours);
            };
            let (result, ()) = tokio::join!(migration_end(&mut self.qmp), feeding);
            result
        };
        let began = Instant::now();
        let loaded = finish(&name, "loading its state", &console, loading).await;
        self.vmm_time += began.elapsed();
        loaded
    }

    /// Its RAM file, if that tells what is in it and what never was. One of huge pages has no holes
    /// to find; where it matters, because the guest has a parent, its page table is asked instead.
    fn memory(&self, served: Option<&[ClaimedRegion]>) -> io::Result<MemoryImage> {
        let huge = served.filter(|regions| {
            let mut regions = regions.iter();
            regions.any(|region| region.page_size > PageSize::Size4K.bytes())
        });
        let Some(regions) = huge else {
            return Ok(MemoryImage::File(self.ram.try_clone()?));
        };
        let page_bytes = PageSize::Size2M.bytes();
        let pages = PageCount::new(self.ram.metadata()?.len() / page_bytes);
        let regions = RegionTable::new(regions, page_bytes, pages).map_err(io::Error::other)?;
        ProcessMemory::open(self.process.pid(), regions).map(MemoryImage::Process)
    }

    /// Gives QEMU a descriptor under a name.
    async fn lend(&mut self, name: &str, fd: &UnixStream) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": name });
        self.qmp
            .execute_with("getfd", arguments, &[fd.as_fd()])
            .await
            .map(|_| ())
    }

    async fn run(&mut self, command: &str, arguments: Value) -> Result<(), VmmError> {
        let console = self.process.console().clone();
        let began = Instant::now();
        let executed = self.qmp.execute(command, arguments);
        let executed = finish(&self.name, command, &console, executed).await;
        self.vmm_time += began.elapsed();
        executed.map(|_| ())
    }
}

#[async_trait]
impl Machine for QemuMachine {
    async fn stop(&mut self) -> Result<(), VmmError> {
        self.run("stop", json!({})).await
    }

    async fn save(&mut self, served: Option<&[ClaimedRegion]>) -> Result<Saved, VmmError> {
        let console = self.process.console().clone();
        let name = self.name.clone();
        let saving = async {
            let (mut ours, theirs) = UnixStream::pair()?;
            self.lend("state", &theirs).await?;
            drop(theirs);
            self.qmp
                .execute("migrate", json!({ "uri": "fd:state" }))
                .await?;
            let mut state = Vec::with_capacity(512 << 10);
            let reading = async { ours.read_to_end(&mut state).await };
            let (ended, read) = tokio::join!(migration_end(&mut self.qmp), reading);
            ended?;
            read?;
            Ok(state)
        };
        let state = finish(&name, "saving its state", &console, saving).await?;
        let memory = self.memory(served).map_err(|source| VmmError::Io {
            name,
            command: "sharing its memory".into(),
            source,
        })?;
        Ok(Saved { state, memory })
    }

    async fn go_on(&mut self) -> Result<(), VmmError> {
        self.run("cont", json!({})).await
    }

    async fn limit_disk(&mut self, limits: DiskLimits) -> Result<(), VmmError> {
        self.run("block_set_io_throttle", command::throttle(limits))
            .await
    }

    async fn vcpu_threads(&mut self) -> Result<Vec<i32>, VmmError> {
        let console = self.process.console().clone();
        let asked = self.qmp.execute("query-cpus-fast", json!({}));
        let cpus = finish(&self.name, "naming its vCPUs", &console, asked).await?;
        let thread = |cpu: &Value| i32::try_from(cpu.get("thread-id")?.as_i64()?).ok();
        Ok(cpus
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(thread)
            .collect())
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

    fn vmm_time(&self) -> Duration {
        self.vmm_time
    }

    async fn kill(&mut self) {
        self.process.kill().await;
    }
}

/// The RAM file of a process, as it was told.
fn ram_of(pid: i32) -> io::Result<File> {
    let arguments = arguments_of(pid)?;
    let mut options = arguments.iter().flat_map(|argument| argument.split(','));
    let found = options.find_map(|option| option.strip_prefix("mem-path=/proc/self/"));
    let found = found.ok_or_else(|| io::Error::other("it was told of no memory"))?;
    File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/{found}"))
}

/// Waits until a migration has ended, either way.
async fn migration_end(qmp: &mut Qmp) -> Result<(), QmpError> {
    let ended = |data: &Value| matches!(data["status"].as_str(), Some("completed" | "failed"));
    let data = qmp.wait_for("MIGRATION", ended).await?;
    if data["status"] == "completed" {
        return Ok(());
    }
    let answer = qmp.execute("query-migrate", json!({})).await?;
    let reason = answer["error-desc"]
        .as_str()
        .unwrap_or("the migration failed");
    Err(QmpError::Refused(reason.to_owned()))
}

/// Bounds an exchange with QEMU and gives its failure a name.
async fn finish<T>(
    name: &str,
    command: &str,
    console: &Console,
    exchange: impl Future<Output = Result<T, QmpError>>,
) -> Result<T, VmmError> {
    let (name, command) = (name.to_owned(), command.to_owned());
    match timeout(COMMAND_TIMEOUT, exchange).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(QmpError::Refused(answer))) => Err(VmmError::Refused {
            name,
            command,
            answer,
        }),
        Ok(Err(QmpError::Closed)) => Err(VmmError::Ended {
            name,
            console: console.tail(),
        }),
        Ok(Err(QmpError::Io(source))) if is_hangup(&source) => Err(VmmError::Ended {
            name,
            console: console.tail(),
        }),
        Ok(Err(QmpError::Io(source))) => Err(VmmError::Io {
            name,
            command,
            source,
        }),
        Err(_) => Err(VmmError::Timeout {
            name,
            command,
            seconds: COMMAND_TIMEOUT.as_secs(),
        }),
    }
}

fn is_hangup(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionReset | ConnectionRefused
    )
}
