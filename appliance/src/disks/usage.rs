//! How much of the host a disk takes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use snapshot_format::file_name::{ROOTFS, ROOTFS_BASE, ROOTFS_COW};

use super::DiskError;

/// How much of the host a disk takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// What the guest sees.
    pub size_bytes: u64,
    /// What is stored for this disk; with reflinks, shared blocks count, too.
    pub stored_bytes: u64,
    /// How much that may get; without a bound of its own when absent.
    pub limit_bytes: Option<u64>,
    /// A write of the guest has failed because of that bound.
    pub is_full: bool,
}

/// How much the disk in a directory takes: of a sandbox, or of a build.
///
/// # Errors
/// There is none.
pub fn usage_of(dir: &Path) -> Result<Usage, DiskError> {
    let look = |name: &str| {
        let path = dir.join(name);
        fs::metadata(&path).map_err(DiskError::file("Looking at", path))
    };
    let (size, stored, limit_bytes) = match look(ROOTFS_COW) {
        Ok(changes) => (look(ROOTFS_BASE)?, changes.blocks(), Some(changes.len())),
        Err(_) => {
            let whole = look(ROOTFS)?;
            let blocks = whole.blocks();
            (whole, blocks, None)
        }
    };
    Ok(Usage {
        size_bytes: size.len(),
        stored_bytes: stored * 512,
        limit_bytes,
        is_full: false,
    })
}
