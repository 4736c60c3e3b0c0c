//! Reconciling while the daemon runs: looks for what belongs to nobody, and removes it.
//!
//! At a start, [`recovery`](crate::recovery) does more, because nothing runs then. Here everything that
//! a sandbox has, or may be getting, is left alone; who is in doubt stays.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use http_api::wire::{Finding, FindingKind, Reconciled};
use http_api::{ApiError, ControlPlane};

use super::Gateway;
use super::refusal::catalogue_failed;
use crate::catalogue::sandboxes;
use crate::disks::{DiskError, Disks};
use crate::network::address;
use crate::reconcile::{Seen, left_over};
use crate::sandbox::OperationError;
use crate::vmm::cgroup::Cgroups;

impl Gateway {
    pub(super) async fn reconcile_now(&self) -> Result<Reconciled, ApiError> {
        let host = &self.host;
        let dirs = [
            host.data_dir.join("sandboxes"),
            host.run_dir.join("sandboxes"),
        ];
        // Those of VMMs that wait have a dot.
        let groups = host.confinement.groups();
        let grouped = groups.map(Cgroups::names).unwrap_or_default();
        let grouped: BTreeSet<String> = grouped
            .into_iter()
            .filter(|name| !name.contains('.'))
            .collect();
        let with_disks = self.owners_of_disks().await?;
        let seen = Seen {
            directories: dirs
                .iter()
                .flat_map(|dir| names(dir))
                .chain(grouped.iter().cloned())
                .chain(with_disks.iter().cloned())
                .collect(),
            rows: self.rows().await?,
            starting: {
                let starting = self.starting.lock();
                starting.keys().map(ToString::to_string).collect()
            },
            known: {
                let known = self.list().await?.into_iter();
                known.map(|sandbox| sandbox.id.to_string()).collect()
            },
            rows_after: self.rows().await?,
        };
        let (rows, directories) = left_over(&seen);
        let mut found = Vec::new();
        for id in rows {
            let removed = self.remove_row(&id).await;
            found.push(finding(
                FindingKind::Row,
                id,
                removed.map_err(|e| e.to_string()),
            ));
        }
        // With the processes in them, which may have disks open.
        for (slot, removed) in host.slots.sweep().await {
            let name = address::namespace(host.slots.instance(), slot);
            let removed = removed.map_err(|error| format!("{error}: {}", error.source));
            found.push(finding(FindingKind::Slot, name, removed));
        }
        for id in directories {
            let ended = groups.map_or(Ok(()), |groups| groups.end(&id));
            if with_disks.contains(&id) {
                let cleared = self.clear_disk(&id).await;
                found.push(finding(FindingKind::Disk, id.clone(), cleared));
            }
            let paths = dirs.iter().map(|dir| dir.join(&id));
            let there: Vec<_> = paths.filter(|dir| dir.exists()).collect();
            let is_grouped = grouped.contains(&id);
            if there.is_empty() && !is_grouped {
                continue;
            }
            let removed = there.iter().try_for_each(fs::remove_dir_all);
            let removed = ended.and(removed).map_err(|error| error.to_string());
            found.push(finding(FindingKind::Directory, id, removed));
        }
        for build in host.collect_garbage().await.map_err(catalogue_failed)? {
            found.push(finding(FindingKind::Build, build.to_string(), Ok(())));
        }
        for what in &found {
            tracing::warn!(kind = ?what.kind, name = what.name, removed = what.removed, "Left over");
        }
        Ok(Reconciled {
            sandboxes: seen.known.len(),
            found,
        })
    }

    /// Sandboxes of whose disks there is anything in the kernel.
    async fn owners_of_disks(&self) -> Result<BTreeSet<String>, ApiError> {
        self.with_disks(Disks::owners)
            .await
            .map_err(|error| ApiError::failed("disk_failed", &error))
    }

    async fn clear_disk(&self, id: &str) -> Result<(), String> {
        let id = id.to_owned();
        let clear = move |disks: &Disks, sandboxes: &Path| disks.clear(&id, sandboxes);
        let cleared = self.with_disks(clear).await;
        cleared.map_err(|error| uffd_engine::chain(&error))
    }

    /// Carries out something that blocks.
    async fn with_disks<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Disks, &Path) -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, OperationError> {
        let (disks, sandboxes) = (
            self.host.disks.clone(),
            self.host.data_dir.join("sandboxes"),
        );
        let acting = tokio::task::spawn_blocking(move || act(&disks, &sandboxes));
        Ok(acting.await.map_err(|_| OperationError::Worker)??)
    }

    /// Ids of all rows in the catalogue.
    async fn rows(&self) -> Result<BTreeSet<String>, ApiError> {
        let all = |connection: &mut rusqlite::Connection| sandboxes::all(connection);
        let rows = self
            .host
            .catalogue
            .call(all)
            .await
            .map_err(catalogue_failed)?;
        Ok(rows.iter().map(|row| row.id.to_string()).collect())
    }

    async fn remove_row(&self, id: &str) -> Result<(), ApiError> {
        let id = id.parse().map_err(|error| ApiError::BadRequest {
            field: "id".into(),
            detail: format!("{error}"),
        })?;
        let remove =
            move |connection: &mut rusqlite::Connection| sandboxes::remove(connection, &id);
        self.host
            .catalogue
            .call(remove)
            .await
            .map_err(catalogue_failed)?;
        Ok(())
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).collect()
}

fn finding(kind: FindingKind, name: String, removed: Result<(), String>) -> Finding {
    Finding {
        kind,
        name,
        removed: removed.is_ok(),
        reason: removed.err(),
    }
}
