//! An owner's snapshot: a template of its sandbox, which goes on as it was.

use http_api::ApiError;
use http_api::ids::TemplateName;
use http_api::wire::{SandboxState, Snapshot, SnapshotKind};
use snapshot_format::BuildId;

use super::OperationError;
use super::owner::Owner;
use super::snapshot::{Purpose, Taken, take};
use crate::catalogue::{TemplateRow, builds, templates};
use crate::guest::Guest;
use crate::template::Template;

/// What a template is to be called, and whether for long.
#[derive(Clone, Debug)]
pub struct NewTemplate {
    /// Its name.
    pub name: TemplateName,
    /// Nobody sees it, and it goes when what is made of it is made.
    pub transient: bool,
}

impl Owner {
    /// Makes a template; the sandbox goes on as it was.
    pub(super) async fn snapshot(&mut self, name: NewTemplate) -> Result<Snapshot, ApiError> {
        let row = self.cell.row();
        let Some(mut live) = self.live.take() else {
            // Paused: its build is the snapshot.
            let Some(build) = row.build else {
                return Err(self.no_vmm().await);
            };
            let unchanged = "The sandbox stays paused";
            return self
                .add_template(name, build)
                .await
                .map_err(|error| error.into_api(unchanged));
        };
        let guest = Guest::at(self.cell.address()).with_token(row.access_token.clone());
        let taken = take(&self.host, &row, &mut live, &guest, Purpose::Template).await;
        let made = match taken {
            Ok(taken) => self.record_snapshot(name, taken).await,
            Err(error) => Err(error),
        };
        match made {
            Ok(snapshot) => match live.go_on().await {
                Ok(()) => {
                    self.live = Some(live);
                    self.settle(SandboxState::Running, None).await;
                    Ok(snapshot)
                }
                Err(error) => {
                    // It is asked once more; the template is there in any case.
                    let failed = self.back_to_running(live, error.into()).await;
                    match self.live {
                        Some(_) => Ok(snapshot),
                        None => Err(failed),
                    }
                }
            },
            Err(error) => Err(self.back_to_running(live, error).await),
        }
    }

    async fn record_snapshot(
        &self,
        name: NewTemplate,
        taken: Taken,
    ) -> Result<Snapshot, OperationError> {
        let Taken {
            row: build,
            reservation,
        } = taken;
        let id = build.id;
        let put = move |connection: &mut rusqlite::Connection| builds::put(connection, &build);
        self.host.catalogue.call(put).await?;
        let snapshot = self.add_template(name, id).await;
        drop(reservation);
        if snapshot.is_err() {
            self.collect_garbage().await;
        }
        snapshot
    }

    async fn add_template(
        &self,
        NewTemplate { name, transient }: NewTemplate,
        build: BuildId,
    ) -> Result<Snapshot, OperationError> {
        let taken = OperationError::NameTaken {
            name: name.to_string(),
        };
        let sandbox = self.cell.row();
        let created_at_ms = crate::clock::now_ms();
        let row = TemplateRow {
            name: name.clone(),
            build,
            shape: sandbox.shape,
            created_at_ms,
            sandbox: Some(sandbox.id),
            access_token: sandbox.access_token,
            disk_mb: sandbox.disk_mb,
            transient,
        };
        let stored = row.clone();
        let insert = move |connection: &mut rusqlite::Connection| {
            if !templates::insert(connection, &stored)? {
                return Ok(None);
            }
            builds::get(connection, build)
        };
        // A name of the configuration counts as taken, too.
        if self.host.templates.read().contains_key(&name) {
            return Err(taken);
        }
        let Some(build_row) = self.host.catalogue.call(insert).await? else {
            return Err(taken);
        };
        self.host
            .templates
            .write()
            .insert(name.clone(), Template::from(row.clone()));
        Ok(Snapshot {
            name,
            kind: SnapshotKind::Memory,
            build: Some(build.to_string()),
            generation: Some(build_row.generation.get()),
            vcpus: row.shape.vcpus,
            memory_mb: row.shape.memory_mb,
            huge_pages: row.shape.huge_pages,
            disk_mb: row.disk_mb,
            sandbox: row.sandbox,
            diff_pages: Some(build_row.stored_pages),
            created_at_ms,
        })
    }
}
