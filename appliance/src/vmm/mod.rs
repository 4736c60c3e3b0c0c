//! VMMs: one trait for all, a driver each.
//!
//! A [`Driver`] turns a guest's shape and a place on the host into a [`Machine`]; a machine
//! can be stopped, saved, let go on, and killed. Drivers know no catalogue, no API of ours and no
//! page contents; who serves a restored guest's faults is told to them as a socket path.
//!
//! What differs between VMMs is said, not asked for by name: [`Driver::paging`] is how a guest's
//! memory comes back, [`Driver::tracking`] how its writes can be known, and [`Machine::save`] says
//! where its memory is to be read.

mod api;
mod appearing;
pub mod cgroup;
pub mod choice;
pub mod compatibility;
pub mod confinement;
pub mod console;
pub mod drivers;
pub mod exit;
pub mod kernel_image;
pub mod launch;
pub mod memory;
mod opening;
pub mod own_user;
pub mod prepared;
mod probe_guest;
pub mod probing;
pub mod process;
mod rate_limiter;
pub mod ready;

pub mod cloud_hypervisor;
pub mod firecracker;
pub mod qemu;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use http_api::wire::{self, VmmInfo};
use snapshot_format::PageSize;
use thiserror::Error;
use tokio::sync::oneshot;
use uffd_engine::Tracking;
use uffd_engine::memory_image::MemoryImage;
use uffd_engine::region::ClaimedRegion;

use memory::MemorySize;
use prepared::Prepares;
use process::Survivor;

/// What a guest is: fixed from its template on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestShape {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
    /// Whether its memory is of pages of 2 MiB; it is saved in such pages then, too.
    pub huge_pages: bool,
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// Kernel command line, without what drivers add.
    pub cmdline: String,
}

impl GuestShape {
    /// Memory in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mb) << 20
    }

    /// The same, and in what pages.
    #[must_use]
    pub fn memory(&self) -> MemorySize {
        MemorySize {
            bytes: self.memory_bytes(),
            page_size: if self.huge_pages {
                PageSize::Size2M
            } else {
                PageSize::Size4K
            },
        }
    }
}

/// Where on the host a machine lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// For messages and the VMM's process name.
    pub name: String,
    /// What it was made from; guests may ask for it.
    pub template: String,
    /// The slot's number, which no other running machine of this daemon has.
    pub slot: u32,
    /// A directory of its own for sockets.
    pub run_dir: PathBuf,
    /// The network namespace it runs in.
    pub namespace: PathBuf,
    /// Its disk image; the VMM sees it under a path that is the same for all.
    pub disk: PathBuf,
    /// How much it may do with its disk.
    pub disk_limits: DiskLimits,
    /// The control group that its process is born in, if there is one.
    pub cgroup: Option<cgroup::Cgroup>,
}

/// How fast a guest may read and write its disk; the network's limits are its slot's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Bytes a second.
    pub bytes_per_s: Option<u64>,
    /// Reads and writes a second.
    pub ops_per_s: Option<u64>,
}

impl DiskLimits {
    /// These, where a sandbox has none of its own.
    #[must_use]
    pub fn with(self, own: wire::DiskLimits) -> Self {
        let bytes_per_s = own.mib_per_s.map(|mib| mib << 20);
        Self {
            bytes_per_s: bytes_per_s.or(self.bytes_per_s),
            ops_per_s: own.ops_per_s.or(self.ops_per_s),
        }
    }
}

/// Why a VMM did not do what it was told.
#[derive(Debug, Error)]
pub enum VmmError {
    /// The process could not be started.
    #[error("Starting the VMM of {name}")]
    Start {
        /// Which sandbox.
        name: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It ended.
    #[error("The VMM of {name} has ended: {console}")]
    Ended {
        /// Which sandbox.
        name: String,
        /// The last lines it printed.
        console: String,
    },
    /// It refused a command.
    #[error("The VMM of {name} refused {command}: {answer}")]
    Refused {
        /// Which sandbox.
        name: String,
        /// What it was told.
        command: String,
        /// What it said.
        answer: String,
    },
    /// It did not answer in time.
    #[error("The VMM of {name} did not finish {command} within {seconds} s")]
    Timeout {
        /// Which sandbox.
        name: String,
        /// What it was told.
        command: String,
        /// How long it had.
        seconds: u64,
    },
    /// It can't do that to a guest that runs.
    #[error("The VMM of {name} does no {command} while its guest runs; pause it first")]
    NotWhileRunning {
        /// Which sandbox.
        name: String,
        /// What it was told.
        command: String,
    },
    /// The kernel can't be given to it.
    #[error("Preparing the kernel of {name}")]
    Kernel {
        /// Which sandbox.
        name: String,
        /// Why not.
        #[source]
        source: kernel_image::KernelError,
    },
    /// The device state is none of this kind of VMM, or damaged.
    #[error("The device state of {name} can't be used")]
    State {
        /// Which sandbox.
        name: String,
        /// What is wrong with it.
        #[source]
        source: cloud_hypervisor::StateError,
    },
    /// Talking to it failed.
    #[error("Talking to the VMM of {name}: {command}")]
    Io {
        /// Which sandbox.
        name: String,
        /// What it was told.
        command: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl VmmError {
    /// It can't be taken over.
    fn adopting(name: &str, source: std::io::Error) -> Self {
        Self::Io {
            name: name.to_owned(),
            command: "taking it over".into(),
            source,
        }
    }
}

/// How a guest is brought back.
#[derive(Debug)]
pub struct Restore<'a> {
    /// The device state, as [`Machine::save`] gave it.
    pub state: Vec<u8>,
    /// Where whoever serves its memory listens.
    pub handoff: &'a Path,
    /// Whether the device state may hold limits of the disk, which have to be changed to today's.
    pub had_disk_limits: bool,
    /// Whether it runs as soon as it is there; else it is stopped until [`Machine::go_on`].
    pub run: bool,
    /// Where a VMM that asks for pages says how; others drop it.
    pub asks: Option<oneshot::Sender<PageRequests>>,
}

/// How the memory of a restored guest comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// Its VMM hands a userfaultfd over to whoever listens at [`Driver::handoff`].
    HandedOver,
    /// Its VMM asks for pages: [`Restore::asks`]. It asks for all of them, sooner or later.
    Requested,
    /// Its VMM reads them out of a plain memory file, which is at [`Driver::handoff`] when it is
    /// told to.
    Own,
}

/// A VMM that asks for pages.
#[derive(Debug)]
pub struct PageRequests {
    /// Where it asks, in the way of Cloud Hypervisor's migration protocol.
    pub connection: OwnedFd,
    /// The guest's memory, as it maps it.
    pub memory: OwnedFd,
    /// Its process.
    pub pidfd: OwnedFd,
    /// The guest's memory, with guest addresses for host addresses.
    pub regions: Vec<ClaimedRegion>,
}

/// One kind of VMM.
#[async_trait]
pub trait Driver: Send + Sync {
    /// What it is and why it was chosen.
    fn info(&self) -> &VmmInfo;

    /// The version of its device states: what one version writes, one with the same can read.
    fn state_format(&self) -> &str;

    /// What its VMM takes besides the guest's memory, in MiB; more than that is not to be had.
    fn overhead_mb(&self) -> u64 {
        256
    }

    /// How the memory of a restored guest comes back.
    fn paging(&self) -> Paging {
        Paging::HandedOver
    }

    /// How the writes of a guest whose memory is served can be known.
    fn tracking(&self) -> Tracking;

    /// Where its VMM finds whoever serves the memory of a guest at this place, or the memory
    /// itself. The directory is there when this returns.
    ///
    /// # Errors
    /// It can't be made.
    fn handoff(&self, place: &Place) -> std::io::Result<PathBuf>;

    /// Starts a guest from its kernel.
    ///
    /// # Errors
    /// Nothing of it is left.
    async fn boot(&self, shape: &GuestShape, place: &Place) -> Result<Box<dyn Machine>, VmmError>;

    /// Starts a guest from a device state, with empty memory that is served.
    ///
    /// # Errors
    /// Nothing of it is left.
    async fn restore(
        &self,
        shape: &GuestShape,
        place: &Place,
        restore: Restore<'_>,
    ) -> Result<Box<dyn Machine>, VmmError>;

    /// Takes over a guest whose VMM an earlier daemon started, booted or restored, at the same place.
    /// It runs afterwards, whatever was under way with it.
    ///
    /// # Errors
    /// It can't be taken over; nothing of it is left.
    async fn adopt(
        &self,
        shape: &GuestShape,
        place: &Place,
        survivor: Survivor,
    ) -> Result<Box<dyn Machine>, VmmError>;

    /// How its VMMs wait for guests that are to come; `None` if they don't.
    fn prepares(&self) -> Option<&dyn Prepares> {
        None
    }
}

/// What a stopped machine is.
#[derive(Debug)]
pub struct Saved {
    /// The device state.
    pub state: Vec<u8>,
    /// Where its memory is to be read, for as long as it is stopped.
    pub memory: MemoryImage,
}

/// One running VMM.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Stops the vCPUs.
    ///
    /// # Errors
    /// They may still run.
    async fn stop(&mut self) -> Result<(), VmmError>;

    /// The state of a stopped machine. `served` is the memory of one that was restored, as it
    /// was handed over.
    ///
    /// # Errors
    /// The machine is stopped still and can go on.
    async fn save(&mut self, served: Option<&[ClaimedRegion]>) -> Result<Saved, VmmError>;

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// They may be stopped still.
    async fn go_on(&mut self) -> Result<(), VmmError>;

    /// Limits what its running guest may do with its disk, from now on.
    ///
    /// # Errors
    /// The limits are what they were; [`VmmError::NotWhileRunning`] if this VMM never can.
    async fn limit_disk(&mut self, limits: DiskLimits) -> Result<(), VmmError>;

    /// The threads that are its vCPUs.
    ///
    /// # Errors
    /// The VMM does not say.
    async fn vcpu_threads(&mut self) -> Result<Vec<i32>, VmmError>;

    /// How long whoever drives it has waited for the VMM so far; the rest of what it takes is ours.
    fn vmm_time(&self) -> Duration {
        Duration::ZERO
    }

    /// Becomes readable when the process ends.
    fn pidfd(&self) -> BorrowedFd<'_>;

    /// How the process ended, if it has.
    fn exit(&mut self) -> Option<exit::Exit>;

    /// Its process, for people.
    fn pid(&self) -> i32;

    /// The last lines the guest and the VMM printed.
    fn console(&self) -> console::Console;

    /// Ends the process and waits until it has.
    async fn kill(&mut self);
}

/// How long a VMM may take for one command, unless the configuration says otherwise; generous,
/// because the host may be emulated.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
