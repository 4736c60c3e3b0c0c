//! What can go wrong while something is done to a sandbox, and what the caller is told.

use http_api::ApiError;
use thiserror::Error;

use crate::catalogue::CatalogueError;
use crate::disks::DiskError;
use crate::engines::{EngineError, Lost};
use crate::guest::GuestError;
use crate::huge_pages::TooFew;
use crate::integrity::IntegrityError;
use crate::network::SlotError;
use crate::vmm::VmmError;
use crate::vmm::compatibility::Incompatible;

/// Why an operation on a sandbox failed.
#[derive(Debug, Error)]
pub enum OperationError {
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The host's huge pages.
    #[error(transparent)]
    HugePages(#[from] TooFew),
    /// The network.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The guest and what it printed last.
    #[error("{source}; its console ends with: {console}")]
    Boot {
        /// What failed.
        source: GuestError,
        /// The last lines.
        console: String,
    },
    /// The catalogue.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// The build can't be resumed on this host.
    #[error("The build can't be resumed on this host")]
    Incompatible(#[from] Incompatible),
    /// The build can't be resumed from.
    #[error(transparent)]
    Integrity(#[from] IntegrityError),
    /// Its memory could not be written.
    #[error(transparent)]
    Capture(#[from] uffd_engine::dirty::CaptureError),
    /// The build could not be made.
    #[error("Publishing the build")]
    Publish(#[from] snapshot_format::FormatError),
    /// A file of the sandbox's own.
    #[error("{operation}")]
    File {
        /// What was tried.
        operation: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// It outlived its daemon, and can't be taken over.
    #[error("Its guest can't be taken over: {problem}")]
    Adoption {
        /// Why not.
        problem: String,
    },
    /// It outlived its daemon, and its memory did not.
    #[error("Its guest can't be taken over")]
    Memory(#[from] Lost),
    /// The template's name was taken meanwhile.
    #[error("There is a template {name:?} already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// A thread that did the blocking part panicked.
    #[error("A worker thread failed")]
    Worker,
}

impl OperationError {
    /// What the caller is told, `outcome` being what became of the sandbox.
    #[must_use]
    pub fn into_api(self, outcome: &str) -> ApiError {
        let text = uffd_engine::chain(&self);
        let detail = format!("{text}. {outcome}");
        if let Self::NameTaken { name } = self {
            return ApiError::Exists {
                what: "template",
                name,
            };
        }
        if out_of_space(&self) || matches!(self, Self::Disk(DiskError::Full { .. })) {
            return ApiError::Full { detail };
        }
        let code = match &self {
            Self::Integrity(_) => return ApiError::Corrupt { detail },
            Self::Incompatible(_) => return ApiError::Incompatible { detail },
            Self::HugePages(_) => return ApiError::Full { detail },
            Self::Vmm(_) => "vmm_failed",
            Self::Engine(_) => "engine_failed",
            Self::Slot(_) => "network_failed",
            Self::Guest(_) | Self::Boot { .. } => "guest_failed",
            Self::Catalogue(_) => "catalogue_failed",
            Self::Disk(_) | Self::File { .. } => "disk_failed",
            Self::Capture(_) | Self::Publish(_) => "snapshot_failed",
            Self::NameTaken { .. } | Self::Adoption { .. } | Self::Memory(_) | Self::Worker => {
                "internal"
            }
        };
        ApiError::Failed { code, detail }
    }
}

/// Whether the disk is full, however deep in the chain that is.
fn out_of_space(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::StorageFull
        {
            return true;
        }
        cause = error.source();
    }
    false
}
