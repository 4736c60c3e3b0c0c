//! Why a disk could not be made, kept or copied.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::cow::CowError;

/// Why a disk is not as it should be.
#[derive(Debug, Error)]
pub enum DiskError {
    /// An image can't be copied.
    #[error("Copying disk {} to {}", from.display(), to.display())]
    Copy {
        /// The image.
        from: PathBuf,
        /// The copy; nothing is left of it.
        to: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A copy-on-write file is not one.
    #[error("Reading {}", path.display())]
    Cow {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: CowError,
    },
    /// A block device can't be put together or taken apart.
    #[error("Disk of {name}: {step}")]
    Device {
        /// Whose disk.
        name: String,
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A guest has written all that it may.
    #[error(
        "The disk of {name} is full: its guest has changed all of the {limit_mb} MiB that its \
         copy-on-write file may hold, and further writes fail. Raise disks.cow_mb, then pause and \
         resume it"
    )]
    Full {
        /// Whose disk.
        name: String,
        /// How long its file may get.
        limit_mb: u64,
    },
    /// An image is not what is asked for.
    #[error("Disk image {} {problem}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What is wrong and what would do.
        problem: String,
    },
    /// Another step with a file.
    #[error("{step} {}", path.display())]
    File {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The configured backend can't be used here.
    #[error("disks.backend is {backend:?}, which this host can't: {reason}")]
    Backend {
        /// As configured.
        backend: &'static str,
        /// Why not.
        reason: String,
    },
}

impl DiskError {
    /// Whether a device of this name is in the kernel.
    pub(super) fn is_there_already(&self) -> bool {
        matches!(self, Self::Device { source, .. } if source.raw_os_error() == Some(libc::EBUSY))
    }

    pub(super) fn file(
        step: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { step, path, source }
    }
}
