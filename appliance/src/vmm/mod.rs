//! VMMs: one trait for all, a driver each.
//!
//! A [`Driver`] turns a guest's shape and a place on the host into a [`Machine`]; a machine
//! can be stopped, saved, let go on, and killed. Drivers know no catalogue, no HTTP and no
//! page contents; who serves a restored guest's faults is told to them as a socket path.

pub mod console;
pub mod launch;
pub mod process;
pub mod qemu;

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use http_api::wire::VmmInfo;
use thiserror::Error;

/// What a guest is: fixed from its template on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestShape {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
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
}

/// Where on the host a machine lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// For messages and the VMM's process name.
    pub name: String,
    /// A directory of its own for sockets.
    pub run_dir: PathBuf,
    /// The network namespace it runs in.
    pub namespace: PathBuf,
    /// Its disk image; the VMM sees it under a path that is the same for all.
    pub disk: PathBuf,
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

/// One kind of VMM.
#[async_trait]
pub trait Driver: Send + Sync {
    /// What it is and why it was chosen.
    fn info(&self) -> &VmmInfo;

    /// Starts a guest from its kernel.
    ///
    /// # Errors
    /// Nothing of it is left.
    async fn boot(&self, shape: &GuestShape, place: &Place) -> Result<Box<dyn Machine>, VmmError>;

    /// Starts a guest from a device state, with empty memory whose faults are served by
    /// whoever listens at `handoff`. It is stopped until [`Machine::go_on`].
    ///
    /// # Errors
    /// Nothing of it is left.
    async fn restore(
        &self,
        shape: &GuestShape,
        place: &Place,
        state: Vec<u8>,
        handoff: &std::path::Path,
    ) -> Result<Box<dyn Machine>, VmmError>;
}

/// One running VMM.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Stops the vCPUs.
    ///
    /// # Errors
    /// They may still run.
    async fn stop(&mut self) -> Result<(), VmmError>;

    /// The device state of a stopped machine.
    ///
    /// # Errors
    /// The machine is stopped still and can go on.
    async fn save(&mut self) -> Result<Vec<u8>, VmmError>;

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// They may be stopped still.
    async fn go_on(&mut self) -> Result<(), VmmError>;

    /// The threads that are its vCPUs.
    ///
    /// # Errors
    /// The VMM does not say.
    async fn vcpu_threads(&mut self) -> Result<Vec<i32>, VmmError>;

    /// The guest's memory as a file.
    fn memory(&self) -> &File;

    /// Becomes readable when the process ends.
    fn pidfd(&self) -> BorrowedFd<'_>;

    /// How the process ended, if it has.
    fn exit(&mut self) -> Option<String>;

    /// Its process, for people.
    fn pid(&self) -> i32;

    /// The last lines the guest and the VMM printed.
    fn console(&self) -> console::Console;

    /// Ends the process and waits until it has.
    async fn kill(&mut self);
}

/// How long a VMM may take for one command; generous, because the host may be emulated.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
