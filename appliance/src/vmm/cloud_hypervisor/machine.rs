//! One Cloud Hypervisor: its process, its API, its events.
//!
//! ```text
//!   running ── stop: has all of its memory, vm.pause ──▶ stopped ── save: its guest is taken ─┐
//!      ▲                                                   │                                  ▼
//!      └────────────── go_on: vm.resume ◀──────────────────┴── its last answer ──────── held, stopped
//! ```
//!
//! Before anything that changes the guest it is asked whether it is there, and in which state.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::net::UnixListener;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use uffd_engine::memory_image::{MemoryImage, Part, Parts};
use uffd_engine::region::ClaimedRegion;

use super::bodies::{
    Balloon, Console as ConsoleBody, Cpus, Disk, FromFile, LandlockRule, Memory, Net, Payload,
    ReceiveMigration, RestoreVm, SendMigration, VmConfig, VmInfo,
};
use super::command::{Boot, EVENT_MONITOR, Layout as Paths, Where, url};
use super::events::Events;
use super::layout::Layout;
use super::receive::{Held, Received, Release, receive};
use super::send::{self, Given};
use super::state::Contents;
use super::{CloudHypervisor, StateError, own};
use crate::network::address::{GATEWAY, GUEST, GUEST_MAC, GUEST_PREFIX, TAP};
use crate::vmm::api::{Api, ApiFault, finish, judge};
use crate::vmm::appearing::Appearing;
use crate::vmm::console::Console;
use crate::vmm::exit::Exit;
use crate::vmm::launch::{DISK_PATH, INITRD_PATH, KERNEL_PATH};
use crate::vmm::memory::MemorySize;
use crate::vmm::opening::{self, Open};
use crate::vmm::own_user::{USERFAULTFD, give, make_dir};
use crate::vmm::process::{Survivor, VmmProcess, arguments_of, read_end, with_a_reader};
use crate::vmm::rate_limiter::RateLimiter;
use crate::vmm::{
    DiskLimits, GuestShape, Machine, PageRequests, Paging, Place, Restore, Saved, VmmError,
};

const RUNNING: &str = "Running";
const PAUSED: &str = "Paused";
/// The thread that goes through all of a restored guest's memory; it ends when it has all of it.
const BRINGS_MEMORY: &str = "uffd-handler";
/// What is refused with these words is possible a little later.
const NOT_YET: &str = "restore is still in progress";
const NOT_YET_EITHER: &str = "restore is in progress";
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

/// Gives the disks of a build the limits of today.
fn limit_disks(vm: &mut Map<String, Value>, limits: DiskLimits) {
    let Some(Value::Array(disks)) = vm.get_mut("disks") else {
        return;
    };
    for disk in disks.iter_mut().filter_map(Value::as_object_mut) {
        match RateLimiter::of(limits) {
            Some(limiter) => disk.insert("rate_limiter_config".into(), json!(limiter)),
            None => disk.remove("rate_limiter_config"),
        };
    }
}

/// A guest that was taken and waits, stopped, for what becomes of it.
#[derive(Debug)]
struct Taken {
    held: Held,
    /// Its VMM answers when it has let the guest go, or at once, according to its version.
    asking: JoinHandle<Result<(), ApiFault>>,
}

/// What of a guest is kept, and the files that its memory is in, by slots.
type GuestParts = (Contents, Vec<(u32, fs::File)>);

/// What a machine is started with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start<'a> {
    pub(super) name: &'a str,
    pub(super) paths: &'a Paths,
    /// Where it is; a probe is nowhere.
    pub(super) place: Option<Where<'a>>,
    /// What it is to boot, if anything.
    pub(super) boot: Option<Boot<'a>>,
}

/// A process whose API is open, and what it says of itself meanwhile.
#[derive(Debug)]
pub(super) struct Waiting {
    open: Open,
    monitor: PipeReader,
    /// Who it is, if not the daemon's user.
    user: Option<u32>,
}

impl Waiting {
    /// Starts the process and waits for its API.
    pub(super) async fn start(
        driver: &CloudHypervisor,
        start: Start<'_>,
    ) -> Result<Self, VmmError> {
        let Start {
            name,
            paths,
            place,
            boot,
        } = start;
        let failed = |source| VmmError::Start {
            name: name.to_owned(),
            source,
        };
        let user = driver.user(place.map_or(0, |place| place.slot));
        make_dir(&paths.dir, user).map_err(failed)?;
        if let (Some(user), Some(disk)) = (user, place.and_then(|place| place.disk)) {
            give(disk, user).map_err(failed)?;
        }
        let launch = paths.launch(&driver.program, place, boot, user);
        let (monitor, events) = io::pipe().map_err(failed)?;
        let events = with_a_reader(&events).map_err(failed)?;
        let fds = [events.as_fd()];
        let open = opening::open(name, (&launch, &fds), &paths.api(), driver.patience).await?;
        Ok(Self {
            open,
            monitor,
            user,
        })
    }

    pub(super) fn process(&self) -> BorrowedFd<'_> {
        self.open.process.as_fd()
    }

    /// Who it is, if not the daemon's user.
    pub(super) fn user(&self) -> Option<u32> {
        self.user
    }
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

    /// A guest from what a build keeps: given to it, or read out of a file.
    pub(super) async fn restore(
        &mut self,
        driver: &CloudHypervisor,
        contents: &Contents,
        restore: Restore<'_>,
    ) -> Result<(), VmmError> {
        let (landlock, run) = (driver.landlock, restore.run);
        if driver.paging == Paging::Own {
            return self.restore_own(contents, landlock, run).await;
        }
        // Without anybody to serve them, the requests have no way to go, and that is an error.
        let asks = restore.asks.unwrap_or_else(|| oneshot::channel().0);
        self.give(contents, landlock, run, asks).await
    }

    /// A guest from its kernel, running. Without a place it has neither disk nor network.
    pub(super) async fn boot(
        &mut self,
        shape: &GuestShape,
        place: Option<&Place>,
        landlock: bool,
    ) -> Result<(), VmmError> {
        let network = place
            .map(|_| format!(" thaw.ip={GUEST}/{GUEST_PREFIX} thaw.gw={GATEWAY}"))
            .unwrap_or_default();
        let config = VmConfig {
            cpus: Cpus {
                boot_vcpus: shape.vcpus,
                max_vcpus: shape.vcpus,
                nested: false,
            },
            memory: Memory {
                size: shape.memory_bytes(),
                shared: true,
                hugepages: self.memory.is_huge(),
                hugepage_size: self.memory.is_huge().then(|| self.memory.page_size.bytes()),
            },
            payload: Payload {
                kernel: KERNEL_PATH.into(),
                initramfs: place.map(|_| INITRD_PATH.into()),
                cmdline: format!("console=ttyS0 panic=-1{network} {}", shape.cmdline),
            },
            disks: place
                .map(|_| Disk {
                    path: DISK_PATH.into(),
                    readonly: false,
                    image_type: "Raw",
                    rate_limiter_config: RateLimiter::of(self.disk_limits),
                })
                .into_iter()
                .collect(),
            net: place
                .map(|_| Net {
                    tap: TAP,
                    mac: GUEST_MAC,
                })
                .into_iter()
                .collect(),
            balloon: place.map(|_| Balloon {
                size: 0,
                deflate_on_oom: true,
                free_page_reporting: true,
            }),
            serial: ConsoleBody { mode: "Tty" },
            console: ConsoleBody { mode: "Off" },
            pvpanic: true,
            landlock_enable: landlock,
            landlock_rules: if landlock {
                landlock_rules()
            } else {
                Vec::new()
            },
        };
        self.put("vm.create", &config).await?;
        self.order("vm.boot").await
    }

    /// A guest from what a build keeps, its memory empty; where it asks for pages goes to `asks`.
    pub(super) async fn give(
        &mut self,
        contents: &Contents,
        landlock: bool,
        run: bool,
        asks: oneshot::Sender<PageRequests>,
    ) -> Result<(), VmmError> {
        let (config, layout) = self.understand(contents, landlock)?;
        let config = config.to_string().into_bytes();
        let socket = self.paths.give();
        let _ = fs::remove_file(&socket);
        let prepared = Appearing::new(&socket).and_then(|appearing| {
            let memory = self.memory.file()?;
            let requests = memory.as_fd().try_clone_to_owned()?;
            Ok((appearing, memory, requests))
        });
        let pidfd = self.process.as_fd().try_clone_to_owned();
        let prepared = prepared.and_then(|prepared| Ok((prepared, pidfd?)));
        let ((appearing, memory, shared), pidfd) =
            prepared.map_err(|source| self.io("making its memory", source))?;
        let given = Given {
            layout: &layout,
            memory: &memory,
            config: &config,
            state: &contents.state,
            run,
        };
        let serve = |connection| {
            let requests = PageRequests {
                connection,
                memory: shared,
                pidfd,
                regions: layout.regions(),
            };
            // Nobody is there any more: the restore was called off.
            let sent = asks.send(requests);
            sent.map_err(|_| ApiFault::Io(io::ErrorKind::BrokenPipe.into()))
        };
        let body = ReceiveMigration {
            receiver_url: url(&self.paths.inside(&socket)),
            memory_mode: "Postcopy",
        };
        let exchange = async {
            let receiving = self.api.put("/api/v1/vm.receive-migration", &body);
            let giving = async {
                let stream = appearing.connect().await?;
                send::send(stream, &socket, &given, serve).await
            };
            tokio::try_join!(receiving, giving).map(|_| ())
        };
        let began = Instant::now();
        let done = finish(&self.name, "vm.receive-migration", self.patience, exchange).await;
        self.vmm_time += began.elapsed();
        let _ = fs::remove_file(&socket);
        self.judge(done).await
    }

    /// A guest from what a build keeps, whose memory's file is there already.
    pub(super) async fn restore_own(
        &mut self,
        contents: &Contents,
        landlock: bool,
        run: bool,
    ) -> Result<(), VmmError> {
        let (config, layout) = self.understand(contents, landlock)?;
        let files = own::files(&config, contents, &layout).map_err(|error| self.state(error))?;
        let dir = self.paths.own();
        let written = files.write(&dir);
        let given = written.and_then(|()| self.give_files(&dir));
        given.map_err(|source| self.io("writing its state", source))?;
        let body = RestoreVm {
            source_url: format!("file://{}", self.paths.inside(&dir).display()),
            memory_restore_mode: self.from_file,
        };
        self.put("vm.restore", &body).await?;
        // It has read the memory's file, or holds it open.
        crate::host::remove_dir(&dir);
        if run {
            self.order("vm.resume").await?;
        }
        Ok(())
    }

    /// Lets it read a directory and what is in it.
    fn give_files(&self, dir: &Path) -> io::Result<()> {
        let Some(user) = self.user else { return Ok(()) };
        for entry in fs::read_dir(dir)? {
            give(&entry?.path(), user)?;
        }
        give(dir, user)
    }

    /// The configuration as it is to be here, and where the memory is by it.
    fn understand(&self, contents: &Contents, landlock: bool) -> Result<(Value, Layout), VmmError> {
        let understood = contents.config().and_then(|mut config| {
            let layout = Layout::of(&config, self.memory)?;
            if let Some(Value::Object(vm)) = config.get_mut("vm_config") {
                vm.insert("landlock_enable".into(), landlock.into());
                if landlock {
                    vm.insert("landlock_rules".into(), json!(landlock_rules()));
                }
                limit_disks(vm, self.disk_limits);
            }
            Ok((config, layout))
        });
        understood.map_err(|error| self.state(error))
    }

    /// Takes the stopped guest: what a build keeps of it, and its memory.
    pub(super) async fn take_guest(&mut self) -> Result<(Vec<u8>, Vec<Part>), VmmError> {
        let state = self.guest_state().await?;
        if state != PAUSED {
            return Err(self.refused("vm.send-migration", format!("its guest is {state}")));
        }
        let socket = self.paths.take();
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).and_then(|listener| {
            self.user.map_or(Ok(()), |user| give(&socket, user))?;
            Ok(listener)
        });
        let listener = listener.map_err(|source| self.io("listening for its guest", source))?;
        let deadline = Instant::now() + self.patience;
        let taken = loop {
            match self.take(&listener).await {
                Err(VmmError::Refused { answer, .. })
                    if is_not_yet(&answer) && Instant::now() < deadline =>
                {
                    sleep(A_LITTLE).await;
                }
                taken => break taken,
            }
        };
        let _ = fs::remove_file(&socket);
        let (contents, files) = taken?;
        kept(self.memory, contents, files).map_err(|error| self.state(error))
    }

    /// Has its VMM hand it over; it stays stopped, and its VMM waits.
    async fn take(&mut self, listener: &UnixListener) -> Result<GuestParts, VmmError> {
        let then = self.events.said();
        let body = SendMigration {
            destination_url: url(&self.paths.inside(&self.paths.take())),
            local: true,
            preserve_source: true,
        };
        let mut api = self.api.beside();
        let mut asking =
            tokio::spawn(async move { api.put("/api/v1/vm.send-migration", &body).await });
        let (events, mut answered) = (&self.events, false);
        let exchange = async {
            let receiving = receive(listener);
            tokio::pin!(receiving);
            loop {
                tokio::select! {
                    received = &mut receiving => return received,
                    answer = &mut asking, if !answered => {
                        answered = true;
                        answer.map_err(io::Error::other)??;
                    }
                    () = events.migration_fails(then) => {
                        return Err(ApiFault::Refused("it says that the migration failed".into()));
                    }
                }
            }
        };
        let done = finish(&self.name, "vm.send-migration", self.patience, exchange).await;
        match self.judge(done).await {
            Ok(received) => {
                if answered {
                    asking = tokio::spawn(async { Ok(()) });
                }
                let Received {
                    config,
                    state,
                    memory,
                    held,
                } = received;
                self.taken = Some(Taken { held, asking });
                Ok((Contents { config, state }, memory))
            }
            Err(error) => {
                asking.abort();
                Err(error)
            }
        }
    }

    /// Waits until it has all of its memory: until then, it lets nobody take its guest.
    async fn has_its_memory(&self) -> Result<(), VmmError> {
        let waiting = async {
            while self.threads(BRINGS_MEMORY).next().is_some() {
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

    /// Its threads whose names begin like this.
    fn threads(&self, name: &'static str) -> impl Iterator<Item = i32> + use<> {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.process.pid()));
        let found = fs::read_dir(&tasks).into_iter().flatten();
        found.filter_map(move |entry| {
            let thread: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let comm = fs::read_to_string(tasks.join(thread.to_string()).join("comm"));
            comm.is_ok_and(|comm| comm.starts_with(name))
                .then_some(thread)
        })
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

/// What it looks up about its tap device, and how it gets a userfaultfd without privilege; a path that
/// is not there would be refused.
fn landlock_rules() -> Vec<LandlockRule> {
    let rules = [("/sys/class/net", "r"), (USERFAULTFD, "rw")];
    let there = rules
        .into_iter()
        .filter(|(path, _)| Path::new(path).exists());
    let rule = |(path, access): (&str, _)| LandlockRule {
        path: path.into(),
        access,
    };
    there.map(rule).collect()
}

/// A guest as a build keeps it, and the parts of its memory in their order.
fn kept(
    memory: MemorySize,
    contents: Contents,
    files: Vec<(u32, fs::File)>,
) -> Result<(Vec<u8>, Vec<Part>), StateError> {
    let mut config = contents.config()?;
    let layout = Layout::of(&config, memory)?;
    let mut files: BTreeMap<u32, fs::File> = files.into_iter().collect();
    let mut parts = Vec::with_capacity(files.len());
    for mapping in layout.mappings() {
        let file = files.remove(&mapping.slot);
        parts.push(Part {
            file: file.ok_or_else(|| StateError::Field {
                field: "slot",
                problem: format!("is {}, and no memory came for it", mapping.slot),
            })?,
            offset: mapping.file_offset,
            bytes: mapping.bytes,
        });
    }
    layout.put_into_one_file(&mut config);
    let packed = Contents {
        config: config.to_string().into_bytes(),
        state: contents.state,
    };
    Ok((packed.pack(), parts))
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
        Ok(self.threads("vcpu").collect())
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

fn is_not_yet(answer: &str) -> bool {
    [NOT_YET, NOT_YET_EITHER, MIGRATING]
        .iter()
        .any(|words| answer.contains(words))
}
