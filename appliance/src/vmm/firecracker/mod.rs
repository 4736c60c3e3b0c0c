//! Firecracker, unmodified, from version 1.13 on: driven over its socket, started by its jailer
//! where one is configured, its seccomp filters on.
//!
//! ```text
//!   boot      machine-config, boot-source, drive, network, balloon, MMDS, InstanceStart
//!   pause     Paused, snapshot/create ─▶ device state;   memory: see below
//!   restore   MMDS, one snapshot/load {Uffd, resume_vm} ─▶ hand-off to the engine
//! ```
//!
//! A guest that was restored is saved without a copy of its memory where this Firecracker writes
//! a device state by itself, which is tried out at start: the changed pages are then read out of
//! its process. Otherwise, and for a guest that was booted, it writes the pages that are in
//! memory to memory. A full snapshot is never asked of a restored guest: it would bring all of
//! its pages in.

mod bodies;
mod command;
mod machine;
#[cfg(test)]
mod openapi;
mod prepared;
pub mod probe;
pub mod probe_guest;
mod saving;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use http_api::wire::VmmInfo;
use uffd_engine::Tracking;

pub use command::Jailer;
use command::{HANDOFF, Layout, Parts};
use machine::{FirecrackerMachine, write_state};
use prepared::PreparedFirecracker;

use super::prepared::{Berth, Prepared, Prepares};
use super::process::Survivor;
use super::{Driver, GuestShape, Machine, Place, Restore, VmmError, kernel_image};

/// Whether a device state is had without memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateOnly {
    /// It was tried.
    Works,
    /// It was tried, or not tried yet.
    Unknown,
}

/// The driver.
#[derive(Clone, Debug)]
pub struct Firecracker {
    program: PathBuf,
    jailer: Option<Jailer>,
    info: VmmInfo,
    state_format: String,
    state_only: StateOnly,
    /// Of large guests, saved pages would be in the wrong places.
    misplaces: bool,
    /// From 1.14 on.
    free_page_reporting: bool,
    /// How long it may take for one command.
    patience: Duration,
    /// Where unpacked kernels are kept.
    kernels: PathBuf,
    options: Options,
}

/// What its guests get that not all do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Booted ones get a vsock device.
    pub vsock: bool,
}

impl Firecracker {
    /// The same one, with one reason more for its choice.
    #[must_use]
    pub fn because(mut self, reason: &str) -> Self {
        self.info.reason = format!("{}; {reason}", self.info.reason);
        self
    }

    /// The same one, with these options.
    #[must_use]
    pub fn with_options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    fn layout(&self, place: &Place) -> Layout {
        Layout::of(place, &self.program, self.jailer.as_ref())
    }
}

#[async_trait]
impl Driver for Firecracker {
    fn info(&self) -> &VmmInfo {
        &self.info
    }

    fn state_format(&self) -> &str {
        &self.state_format
    }

    /// Its threads' own, and in a jail the program's file.
    fn overhead_mb(&self) -> u64 {
        128
    }

    /// Its userfaultfd is opened for removals only; the engine registers it again.
    fn tracking(&self) -> Tracking {
        Tracking::Events
    }

    fn handoff(&self, place: &Place) -> io::Result<PathBuf> {
        let layout = self.layout(place);
        fs::create_dir_all(&layout.dir)?;
        Ok(layout.dir.join(HANDOFF))
    }

    async fn boot(&self, shape: &GuestShape, place: &Place) -> Result<Box<dyn Machine>, VmmError> {
        let kernel = kernel_image::unpacked(&place.name, &shape.kernel, &self.kernels).await?;
        let parts = Parts {
            kernel: Some(&kernel),
            initrd: Some(&shape.initrd),
            disk: Some(&place.disk),
            namespace: Some(&place.namespace),
            memory_bytes: shape.memory_bytes(),
            cgroup: place.cgroup.as_ref(),
        };
        let layout = self.layout(place);
        let mut machine = FirecrackerMachine::start(self, &place.name, layout, &parts).await?;
        machine
            .boot(
                shape,
                &kernel,
                Some((place, self.options)),
                self.free_page_reporting,
            )
            .await?;
        Ok(Box::new(machine))
    }

    async fn restore(
        &self,
        shape: &GuestShape,
        place: &Place,
        restore: Restore<'_>,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let layout = self.layout(place);
        write_state(&layout, &restore.state).map_err(|source| VmmError::Start {
            name: place.name.clone(),
            source,
        })?;
        let parts = Parts {
            kernel: None,
            initrd: None,
            disk: Some(&place.disk),
            namespace: Some(&place.namespace),
            memory_bytes: shape.memory_bytes(),
            cgroup: place.cgroup.as_ref(),
        };
        let mut machine = FirecrackerMachine::start(self, &place.name, layout, &parts).await?;
        machine.restore(place, &restore).await?;
        Ok(Box::new(machine))
    }

    async fn adopt(
        &self,
        shape: &GuestShape,
        place: &Place,
        survivor: Survivor,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let layout = self.layout(place);
        let mut machine =
            FirecrackerMachine::adopt(self, place, layout, shape.memory_bytes(), survivor)?;
        machine.ensure_running().await?;
        Ok(Box::new(machine))
    }

    fn prepares(&self) -> Option<&dyn Prepares> {
        Some(self)
    }
}

#[async_trait]
impl Prepares for Firecracker {
    async fn prepare(&self, berth: &Berth) -> Result<Box<dyn Prepared>, VmmError> {
        let prepared = PreparedFirecracker::start(self, berth).await?;
        Ok(Box::new(prepared))
    }
}
