//! Templates: found, described, removed; and the disk that a sandbox of one gets.

use http_api::ApiError;
use http_api::ids::TemplateName;
use http_api::wire::{Snapshot, SnapshotKind};

use super::Gateway;
use super::refusal::catalogue_failed;
use crate::catalogue::{builds, templates};
use crate::config::check_disk_size;
use crate::disks;
use crate::template::{Origin, Template};

impl Gateway {
    pub(super) fn template(&self, name: &TemplateName) -> Result<Template, ApiError> {
        let template = self.host.templates.read().get(name).cloned();
        template.ok_or_else(|| ApiError::NotFound {
            what: "template",
            name: name.to_string(),
        })
    }

    pub(super) async fn describe(&self, template: Template) -> Result<Snapshot, ApiError> {
        let mut snapshot = Snapshot {
            name: template.name,
            kind: SnapshotKind::Disk,
            build: None,
            generation: None,
            vcpus: template.shape.vcpus,
            memory_mb: template.shape.memory_mb,
            huge_pages: template.shape.huge_pages,
            disk_mb: template.disk_mb,
            sandbox: template.sandbox,
            diff_pages: None,
            created_at_ms: template.created_at_ms,
        };
        if let Origin::Memory(id) = template.origin {
            snapshot.kind = SnapshotKind::Memory;
            snapshot.build = Some(id.to_string());
            let lookup = move |connection: &mut rusqlite::Connection| builds::get(connection, id);
            let row = self
                .host
                .catalogue
                .call(lookup)
                .await
                .map_err(catalogue_failed)?;
            snapshot.generation = row.as_ref().map(|row| row.generation.get());
            snapshot.diff_pages = row.map(|row| row.stored_pages);
        }
        Ok(snapshot)
    }

    /// Gives a new sandbox's disk the size that was asked for.
    pub(super) fn size_disk(&self, template: &mut Template, asked_mb: u64) -> Result<(), ApiError> {
        let refused = |detail| ApiError::BadRequest {
            field: "disk_size_mb".into(),
            detail,
        };
        match &mut template.origin {
            Origin::Disk { image, size_mb } => {
                let has = std::fs::metadata(&*image).map_or(0, |image| image.len());
                check_disk_size(asked_mb, has).map_err(refused)?;
                *size_mb = Some(asked_mb);
                Ok(())
            }
            Origin::Memory(build) => {
                let usage = disks::usage_of(&self.host.store.path(build));
                let usage = usage.map_err(|error| ApiError::failed("disk_failed", &error))?;
                if usage.size_bytes == asked_mb << 20 {
                    return Ok(());
                }
                let has = usage.size_bytes >> 20;
                Err(refused(format!(
                    "is {asked_mb}, but template {:?} has memory that knows its disk of {has} MiB; \
                     leave it out or ask for {has}",
                    template.name.as_str()
                )))
            }
        }
    }

    /// All that are not only for the moment.
    pub(super) async fn describe_templates(&self) -> Result<Vec<Snapshot>, ApiError> {
        let seen = |template: &&Template| !template.transient;
        let templates: Vec<Template> = {
            let all = self.host.templates.read();
            all.values().filter(seen).cloned().collect()
        };
        let mut snapshots = Vec::with_capacity(templates.len());
        for template in templates {
            snapshots.push(self.describe(template).await?);
        }
        Ok(snapshots)
    }

    /// As a request may, which is not any of them.
    pub(super) async fn delete_template(&self, name: &TemplateName) -> Result<(), ApiError> {
        let template = self.template(name)?;
        if matches!(template.origin, Origin::Disk { .. }) {
            let detail = format!("{name} is a template of the configuration file; remove it there");
            return Err(ApiError::BadRequest {
                field: "name".into(),
                detail,
            });
        }
        self.forget_template(name).await
    }

    pub(super) async fn forget_template(&self, name: &TemplateName) -> Result<(), ApiError> {
        let removed = name.clone();
        let remove =
            move |connection: &mut rusqlite::Connection| templates::remove(connection, &removed);
        self.host
            .catalogue
            .call(remove)
            .await
            .map_err(catalogue_failed)?;
        self.host.templates.write().remove(name);
        let collected = self.host.collect_garbage().await;
        collected.map(|_| ()).map_err(catalogue_failed)
    }
}
