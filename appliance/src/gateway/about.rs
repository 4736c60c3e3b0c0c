//! What the host says of itself.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use http_api::wire::{HostInfo, HostStatus, SandboxState};
use http_api::{ApiError, ControlPlane};

use super::Gateway;
use crate::inventory;
use crate::template::Template;

impl Gateway {
    /// What it is, has, and does.
    pub(super) async fn about_host(&self) -> Result<HostInfo, ApiError> {
        let all = self.list().await?;
        let mut states = BTreeMap::new();
        let mut capacity = inventory::room(&self.host.data_dir);
        capacity.slots_total = u64::from(self.host.slots.pool().slots());
        capacity.slots_used = all.len() as u64;
        for sandbox in &all {
            *states.entry(sandbox.state.to_string()).or_default() += 1;
            if !matches!(sandbox.state, SandboxState::Paused | SandboxState::Failed) {
                capacity.vcpus_allocated += u64::from(sandbox.vcpus);
                capacity.memory_allocated_mb += u64::from(sandbox.memory_mb);
            }
        }
        let draining = self.host.draining.load(Ordering::Acquire);
        let seen = |template: &&Template| !template.transient;
        Ok(HostInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            status: if draining {
                HostStatus::Draining
            } else {
                HostStatus::Ready
            },
            kernel: inventory::kernel(),
            vmm: self.host.drivers.chosen().info().clone(),
            disks: self.host.disks.reason().to_owned(),
            shards: self.shards.len(),
            engines: self.host.engines.count(),
            workers: self.host.waiting.clone(),
            sandboxes: all.len(),
            states,
            templates: self.host.templates.read().values().filter(seen).count(),
            cpu: inventory::cpu(),
            nodes: inventory::nodes(),
            hugepages: inventory::hugepages(),
            capacity,
        })
    }
}
