//! What all sandboxes of this host share. Everything here is a handle that may be used
//! from any shard; none of it is locked across a wait.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use http_api::ids::SandboxId;
use parking_lot::{Mutex, RwLock};
use snapshot_format::{BuildId, BuildStore, FormatError};

use crate::catalogue::{Catalogue, CatalogueError, builds};
use crate::config::EngineConfig;
use crate::disks::Disks;
use crate::engines::{Engines, Tables};
use crate::events::Events;
use crate::huge_pages::HugePages;
use crate::metrics::Metrics;
use crate::network::Slots;
use crate::template::Templates;
use crate::tokens::Tokens;
use crate::vmm::DiskLimits;
use crate::vmm::confinement::Confinement;
use crate::vmm::drivers::Drivers;
use crate::vmm::ready::ReadyVmms;

/// The host.
pub struct Host {
    /// Directory of builds, disks and the catalogue.
    pub data_dir: PathBuf,
    /// Directory of sockets and page-state tables.
    pub run_dir: PathBuf,
    /// How long a guest may take to its first answer.
    pub boot_timeout: Duration,
    /// How long a pause waits for the requests under way to its guest.
    pub drain_time: Duration,
    /// What this host has.
    pub catalogue: Catalogue,
    /// Fault-serving processes.
    pub engines: Engines,
    /// Where they keep what happened to each page.
    pub tables: Tables,
    /// What they do for sessions.
    pub engine: EngineConfig,
    /// How their workers wait, and why.
    pub waiting: String,
    /// VMMs.
    pub drivers: Drivers,
    /// Those that wait, started.
    pub ready: ReadyVmms,
    /// What they are confined to.
    pub confinement: Confinement,
    /// The host's huge pages.
    pub huge_pages: HugePages,
    /// Network slots.
    pub slots: Slots,
    /// Disk copies.
    pub disks: Disks,
    /// How much a sandbox may do with its disk that has no limits of its own.
    pub disk_limits: DiskLimits,
    /// Builds.
    pub store: BuildStore,
    /// What sandboxes can start from.
    pub templates: RwLock<Templates>,
    /// What happened, for whoever listens.
    pub events: Events,
    /// Numbers for Prometheus.
    pub metrics: Metrics,
    /// Tokens of callers.
    pub tokens: Tokens,
    /// Set once: nothing new is started any more.
    pub draining: AtomicBool,
    /// Builds that exist or soon will, and are in nobody's row yet.
    pub unrecorded: Mutex<BTreeSet<BuildId>>,
}

impl Host {
    /// Where a sandbox keeps its disk while it has a VMM.
    #[must_use]
    pub fn sandbox_data(&self, id: &SandboxId) -> PathBuf {
        self.data_dir.join("sandboxes").join(id.as_str())
    }

    /// Where a sandbox keeps its sockets and its page-state table while it has a VMM.
    #[must_use]
    pub fn sandbox_run(&self, id: &SandboxId) -> PathBuf {
        self.run_dir.join("sandboxes").join(id.as_str())
    }

    /// A new build's id, which the garbage collection leaves alone until it is dropped.
    #[must_use]
    pub fn reserve_build(self: &Arc<Self>) -> Reservation {
        let id = crate::clock::new_build_id();
        self.unrecorded.lock().insert(id);
        Reservation {
            host: self.clone(),
            id,
        }
    }

    /// Removes the builds that nobody needs any more, and says which.
    ///
    /// # Errors
    /// The catalogue can't say which; a build that can't be removed is logged and stays.
    pub async fn collect_garbage(&self) -> Result<Vec<BuildId>, CatalogueError> {
        let mut removed_builds = Vec::new();
        // The order matters. A build is reserved before it is published and until it is
        // recorded: one that is in the list is reserved still, or recorded by now.
        let Ok(present) = self.store.list() else {
            return Ok(removed_builds);
        };
        let reserved = self.unrecorded.lock().clone();
        let needed = |connection: &mut rusqlite::Connection| builds::needed(connection);
        let needed = self.catalogue.call(needed).await?;
        for id in present {
            if needed.contains(&id) || reserved.contains(&id) {
                continue;
            }
            // Off this thread: a large file takes the file system a while.
            let store = self.store.clone();
            let removed = tokio::task::spawn_blocking(move || store.remove(&id)).await;
            match removed.unwrap_or(Ok(())) {
                // Somebody else may have come first.
                Ok(()) | Err(FormatError::NotFound { .. }) => {
                    tracing::debug!(build_id = %id, "Removed a build that nobody needs");
                    let forget =
                        move |connection: &mut rusqlite::Connection| builds::remove(connection, id);
                    self.catalogue.call(forget).await?;
                    removed_builds.push(id);
                }
                Err(error) => {
                    tracing::warn!(build_id = %id, %error, "A build can't be removed");
                }
            }
        }
        Ok(removed_builds)
    }

    /// The recorded identities of a build's data files and of those it refers to.
    ///
    /// # Errors
    /// The catalogue failed.
    pub async fn identities(
        &self,
        id: BuildId,
    ) -> Result<BTreeMap<BuildId, String>, CatalogueError> {
        let lookup = move |connection: &mut rusqlite::Connection| {
            let mut found = BTreeMap::new();
            let mut wanted = vec![id];
            while let Some(id) = wanted.pop() {
                if let Some(row) = builds::get(connection, id)?
                    && found.insert(id, row.identity).is_none()
                {
                    wanted.extend(row.uses);
                }
            }
            Ok(found)
        };
        self.catalogue.call(lookup).await
    }
}

/// Keeps a build from being collected before it is in the catalogue.
pub struct Reservation {
    host: Arc<Host>,
    /// The build.
    pub id: BuildId,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.host.unrecorded.lock().remove(&self.id);
    }
}

/// Removes a directory that may not be there.
pub fn remove_dir(path: &std::path::Path) {
    if let Err(error) = fs::remove_dir_all(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "A directory can't be removed");
    }
}
