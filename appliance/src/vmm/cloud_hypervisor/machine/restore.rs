//! A guest from what a build keeps: given to its VMM as by a migration, or read by it out of a file.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use serde_json::{Map, Value, json};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::CloudHypervisorMachine;
use super::boot::landlock_rules;
use crate::vmm::api::{ApiFault, finish};
use crate::vmm::appearing::Appearing;
use crate::vmm::cloud_hypervisor::bodies::{ReceiveMigration, RestoreVm};
use crate::vmm::cloud_hypervisor::command::url;
use crate::vmm::cloud_hypervisor::layout::Layout;
use crate::vmm::cloud_hypervisor::send::{self, Given};
use crate::vmm::cloud_hypervisor::state::Contents;
use crate::vmm::cloud_hypervisor::{CloudHypervisor, own};
use crate::vmm::own_user::give;
use crate::vmm::rate_limiter::RateLimiter;
use crate::vmm::{DiskLimits, PageRequests, Paging, Restore, VmmError};

impl CloudHypervisorMachine {
    /// A guest from what a build keeps: given to it, or read out of a file.
    pub(in crate::vmm::cloud_hypervisor) async fn restore(
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

    /// A guest from what a build keeps, its memory empty; where it asks for pages goes to `asks`.
    pub(in crate::vmm::cloud_hypervisor) async fn give(
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
    pub(in crate::vmm::cloud_hypervisor) async fn restore_own(
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
