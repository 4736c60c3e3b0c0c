//! Templates: what a sandbox can start from.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use http_api::ApiError;
use http_api::ids::{SandboxId, TemplateName};
use http_api::wire::CreateSandbox;
use snapshot_format::BuildId;

use crate::catalogue::TemplateRow;
use crate::config::{TemplateConfig, check_shape};
use crate::vmm::GuestShape;

/// Where a template's sandboxes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// They boot from a copy of an image.
    Disk {
        /// The image.
        image: PathBuf,
        /// MiB that the copies have; the image's own size when absent.
        size_mb: Option<u64>,
    },
    /// They are restored from this build.
    Memory(BuildId),
}

/// One template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its name.
    pub name: TemplateName,
    /// Its guest.
    pub shape: GuestShape,
    /// What its sandboxes start from.
    pub origin: Origin,
    /// Unix milliseconds; zero for those of the configuration.
    pub created_at_ms: u64,
    /// The sandbox it was taken of, if it was.
    pub sandbox: Option<SandboxId>,
    /// What the guest's daemon in its memory asks callers for.
    pub access_token: Option<String>,
    /// Size of its disk in MiB.
    pub disk_mb: u64,
    /// A fork's, which nobody sees.
    pub transient: bool,
}

/// The size of a file in MiB, begun ones counted; 0 for one that is not there.
#[must_use]
pub fn size_mb(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |found| found.len().div_ceil(1 << 20))
}

impl From<&TemplateConfig> for Template {
    fn from(config: &TemplateConfig) -> Self {
        Self {
            name: config.name.clone(),
            shape: GuestShape {
                vcpus: config.vcpus,
                memory_mb: config.memory_mb,
                huge_pages: config.huge_pages,
                kernel: config.kernel.clone(),
                initrd: config.initrd.clone(),
                cmdline: config.cmdline.clone(),
            },
            origin: Origin::Disk {
                image: config.disk.clone(),
                size_mb: config.disk_size_mb,
            },
            created_at_ms: 0,
            sandbox: None,
            access_token: None,
            disk_mb: config.disk_size_mb.unwrap_or_else(|| size_mb(&config.disk)),
            transient: false,
        }
    }
}

impl From<TemplateRow> for Template {
    fn from(row: TemplateRow) -> Self {
        Self {
            name: row.name,
            shape: row.shape,
            origin: Origin::Memory(row.build),
            created_at_ms: row.created_at_ms,
            sandbox: row.sandbox,
            access_token: row.access_token,
            disk_mb: row.disk_mb,
            transient: row.transient,
        }
    }
}

impl Template {
    /// The guest that a request gets.
    ///
    /// # Errors
    /// A number that can't be, or that differs from what a memory template has baked in.
    pub fn shape_for(&self, request: &CreateSandbox) -> Result<GuestShape, ApiError> {
        let mut shape = self.shape.clone();
        let vcpus = self.settle("vcpus", request.vcpus, shape.vcpus)?;
        let memory_mb = self.settle("memory_mb", request.memory_mb, shape.memory_mb)?;
        let huge_pages = self.settle("huge_pages", request.huge_pages, shape.huge_pages)?;
        (shape.vcpus, shape.memory_mb, shape.huge_pages) = (vcpus, memory_mb, huge_pages);
        check_shape(vcpus, memory_mb, huge_pages).map_err(|(field, detail)| {
            ApiError::BadRequest {
                field: field.into(),
                detail,
            }
        })?;
        Ok(shape)
    }

    /// What a request gets where it may ask for something else than the template has.
    fn settle<T: PartialEq + Display>(
        &self,
        field: &str,
        wanted: Option<T>,
        has: T,
    ) -> Result<T, ApiError> {
        match wanted {
            Some(wanted) if wanted != has && matches!(self.origin, Origin::Memory(_)) => {
                let detail = format!(
                    "is {wanted}, but template {:?} has memory with {has} baked in; leave it out \
                     or ask for {has}",
                    self.name.as_str()
                );
                Err(ApiError::BadRequest {
                    field: field.into(),
                    detail,
                })
            }
            wanted => Ok(wanted.unwrap_or(has)),
        }
    }
}

/// All templates, by name.
pub type Templates = BTreeMap<TemplateName, Template>;

#[cfg(test)]
mod tests {
    use super::*;

    fn template(origin: Origin) -> Template {
        Template {
            name: "t".parse().unwrap(),
            shape: GuestShape {
                vcpus: 1,
                memory_mb: 512,
                huge_pages: false,
                kernel: "/k".into(),
                initrd: "/i".into(),
                cmdline: String::new(),
            },
            origin,
            created_at_ms: 0,
            sandbox: None,
            access_token: None,
            disk_mb: 0,
            transient: false,
        }
    }

    fn request(vcpus: Option<u32>, memory_mb: Option<u32>) -> CreateSandbox {
        let body = serde_json::json!({ "template": "t", "vcpus": vcpus, "memory_mb": memory_mb });
        serde_json::from_value(body).unwrap()
    }

    fn field(result: Result<GuestShape, ApiError>) -> String {
        match result {
            Err(ApiError::BadRequest { field, .. }) => field,
            other => panic!("expected a 400, got {other:?}"),
        }
    }

    #[test]
    fn a_memory_templates_shape_cannot_be_changed_or_ignored() {
        let memory = template(Origin::Memory(BuildId::from_bytes([1; 16])));
        assert_eq!(field(memory.shape_for(&request(Some(2), None))), "vcpus");
        assert_eq!(
            field(memory.shape_for(&request(None, Some(256)))),
            "memory_mb"
        );
        assert!(memory.shape_for(&request(Some(1), Some(512))).is_ok());
        let huge = CreateSandbox {
            huge_pages: Some(true),
            ..request(None, None)
        };
        assert_eq!(field(memory.shape_for(&huge)), "huge_pages");
    }

    #[test]
    fn a_disk_templates_shape_is_a_default() {
        let disk = template(Origin::Disk {
            image: "/d".into(),
            size_mb: None,
        });
        assert_eq!(
            disk.shape_for(&request(Some(2), Some(256)))
                .unwrap()
                .memory_mb,
            256
        );
        let huge = |memory_mb| CreateSandbox {
            huge_pages: Some(true),
            ..request(None, memory_mb)
        };
        assert!(disk.shape_for(&huge(None)).unwrap().huge_pages);
        assert_eq!(field(disk.shape_for(&huge(Some(257)))), "memory_mb");
        assert_eq!(field(disk.shape_for(&request(Some(0), None))), "vcpus");
        assert_eq!(field(disk.shape_for(&request(None, Some(1)))), "memory_mb");
    }
}
