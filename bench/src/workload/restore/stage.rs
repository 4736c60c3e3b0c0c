//! What is restored, and where: a build of a guest, an engine that serves it, slots, and VMMs that
//! wait.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use appliance::config::AcceleratorChoice;
use appliance::network::{Egress, Slots};
use appliance::vmm::own_user::Users;
use appliance::vmm::ready::{Counts, ReadyVmms};
use appliance::vmm::{DiskLimits, Driver, Paging, Place, cloud_hypervisor, firecracker, qemu};
use http_api::wire::NetworkPolicy;
use snapshot_format::{BuildId, BuildStore, PublishInfo};
use tokio::runtime::Runtime;
use uffd_engine::dirty::Capture;

use super::bare::Calls;
use super::guest::Guest;
use super::serving::Serving;
use super::{OWN_SLOT, PATIENCE, POOLED_SLOT};
use crate::config::{self, Vmm};
use crate::placement;

/// As the daemon's configuration has it.
const FIRST_USER: u32 = 200_000;

/// Finds out about the VMM.
async fn probe(config: &config::Restore, dir: &Path) -> Result<(Arc<dyn Driver>, Calls)> {
    let (run_dir, kernels) = (dir.join("probe"), dir.join("kernels"));
    let driver: (Arc<dyn Driver>, Calls) = match &config.vmm {
        Vmm::Firecracker(program) => {
            let probe = firecracker::probe::Probe {
                program,
                jailer: None,
                run_dir: &run_dir,
                kernels,
                patience: PATIENCE,
            };
            let driver = probe.run().await.context("Probing Firecracker")?;
            (Arc::new(driver), Calls::Firecracker)
        }
        Vmm::CloudHypervisor(program) => {
            let probe = cloud_hypervisor::probe::Probe {
                program,
                run_dir: &run_dir,
                kernels,
                patience: PATIENCE,
                users: Ok(Users::new(FIRST_USER)),
            };
            let driver = probe.run().await.context("Probing Cloud Hypervisor")?;
            ensure!(
                driver.paging() == Paging::Requested,
                "It asks for no pages: {}",
                driver.info().reason
            );
            (Arc::new(driver), Calls::CloudHypervisor)
        }
        Vmm::Qemu { program, preload } => {
            let kernel = config
                .inputs
                .as_deref()
                .map(|inputs| inputs.join("vmlinuz"));
            let kernel = kernel.context("QEMU's guest needs --inputs")?;
            let cache = dir.join("kvm");
            let choice = AcceleratorChoice::Auto;
            let probed = qemu::probe::probe(program, preload, choice, &kernel, &cache, PATIENCE);
            let mut driver = probed.await.context("Probing QEMU")?;
            let users = Users::new(FIRST_USER);
            if qemu::probe::try_users(&driver, users).await.is_ok() {
                driver.users = Some(users);
            }
            (Arc::new(driver.clone()), Calls::Qemu(driver))
        }
    };
    Ok(driver)
}

/// What is restored, and where.
pub(super) struct Stage {
    pub(super) runtime: Runtime,
    pub(super) driver: Arc<dyn Driver>,
    /// What a script says to the VMM.
    pub(super) calls: Calls,
    pub(super) ready: ReadyVmms,
    pub(super) guest: Guest,
    pub(super) place: Place,
    /// Where the host reaches a guest in the slot of restores without a process that waits.
    pub(super) address: Ipv4Addr,
    pub(super) slots: Slots,
    pub(super) state: Vec<u8>,
    pub(super) serving: Serving,
}

impl Stage {
    /// Boots the guest, makes a build of it, and starts an engine that serves it.
    pub(super) fn set(config: &config::Restore, dir: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (driver, calls) = runtime.block_on(probe(config, dir))?;
        let egress = Egress {
            internet: false,
            closed: Vec::new(),
            resolver: None,
        };
        let slots = Slots::start("brest", "10.234.0.0/24".parse()?, egress)?;
        for index in [OWN_SLOT, POOLED_SLOT] {
            runtime.block_on(slots.take_down(index))?;
        }
        let slot = runtime.block_on(slots.take(OWN_SLOT, NetworkPolicy::default()))?;
        let guest = Guest::lay_out(config, dir)?;
        let (shape, disk) = (&guest.shape, dir.join("disk"));
        guest.lay_disk(&disk)?;
        let place = Place {
            name: "bench".into(),
            template: "bench".into(),
            slot: 0,
            run_dir: dir.join("run"),
            namespace: slot.namespace.clone(),
            disk,
            disk_limits: DiskLimits::default(),
            cgroup: None,
        };
        let store = BuildStore::open_or_create(&dir.join("builds"))?;
        let build = BuildId::from_bytes([9; 16]);
        let (pages, page_size) = (shape.memory().pages(), shape.memory().page_size);
        let state = runtime.block_on(async {
            let mut machine = driver.boot(shape, &place).await?;
            guest.settle(slot.address).await?;
            machine.stop().await?;
            let saved = machine.save(None).await?;
            let mut staging = store.stage(build)?;
            let mut writer = staging.memory_writer(None, page_size, pages)?;
            let capture = Capture {
                memory: &saved.memory,
                pages,
                page_bytes: page_size.bytes(),
                states: None,
                unwritten: None,
                check: None,
            };
            capture.write(&mut writer)?;
            writer.finish()?;
            fs::write(staging.file_path("vmstate"), &saved.state)?;
            staging.add_file("vmstate")?;
            staging.publish(PublishInfo::default())?;
            machine.kill().await;
            guest.keep_disk(&place.disk)?;
            Ok::<_, anyhow::Error>(saved.state)
        })?;
        let cpu = placement::allowed()?.first().copied().unwrap_or(0);
        let serving = Serving::start(dir, store.root(), build, pages, cpu)?;
        slots.keep_ready(1, [OWN_SLOT]);
        let ready = ReadyVmms::start(
            (driver.clone(), None),
            slots.clone(),
            dir,
            1,
            Counts::default(),
        )?;
        Ok(Self {
            runtime,
            driver,
            calls,
            ready,
            guest,
            place,
            address: slot.address,
            slots,
            state,
            serving,
        })
    }

    /// Nothing of it stays on the host.
    pub(super) fn clear(self) -> Result<()> {
        self.ready.end();
        self.runtime.block_on(async {
            self.slots.take_down(OWN_SLOT).await?;
            self.slots.take_down(POOLED_SLOT).await?;
            self.slots.end().await?;
            Ok(())
        })
    }
}
