//! The file-system effects of writing and publishing a build, as a trait.
//!
//! Everything that has to happen in a certain order for a crash to be harmless goes through
//! [`Storage`], so that a test can stop at every step. Reading doesn't.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::FormatError;
use crate::sys;

/// What a [`BuildStore`](crate::BuildStore) does to its file system.
///
/// Every method returns after the effect is visible to other processes; only the two `sync`
/// methods make it durable.
pub trait Storage: fmt::Debug + Send + Sync {
    /// Creates a directory whose parent exists; fails if it exists already.
    ///
    /// # Errors
    /// Those of `mkdir(2)`.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Creates or empties a file for reading and writing.
    ///
    /// # Errors
    /// Those of `open(2)`.
    fn create_file(&self, path: &Path) -> io::Result<File>;

    /// Opens a file for reading and writing as it is.
    ///
    /// # Errors
    /// Those of `open(2)`.
    fn open_file(&self, path: &Path) -> io::Result<File> {
        File::options().read(true).write(true).open(path)
    }

    /// Writes all bytes at an offset; `path` names the file for reports.
    ///
    /// # Errors
    /// Those of `pwrite(2)`; some of the bytes may be written then.
    fn write_at(&self, file: &File, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Begins to write what `write_at` took to the disk, so that a later sync finds less to do.
    /// Advice, which changes nothing that anybody can rely on.
    fn start_writeback(&self, file: &File, offset: u64, bytes: u64) {
        let _ = (file, offset, bytes);
    }

    /// Makes the content of a file durable.
    ///
    /// # Errors
    /// Those of `fsync(2)`.
    fn sync_file(&self, path: &Path) -> io::Result<()>;

    /// Makes the entries of a directory durable.
    ///
    /// # Errors
    /// Those of `fsync(2)`.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Renames a file or directory inside the store, atomically. A file replaces another; a
    /// directory fails if `to` exists and is not empty.
    ///
    /// # Errors
    /// Those of `rename(2)`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a directory and everything in it.
    ///
    /// # Errors
    /// Those of `unlink(2)` and `rmdir(2)`.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
}

/// The host's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskStorage;

impl Storage for DiskStorage {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
    }

    fn write_at(&self, file: &File, _path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    fn start_writeback(&self, file: &File, offset: u64, bytes: u64) {
        // A file system that can't do that still has its fsync.
        let _ = sys::start_writeback(file, offset, bytes);
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }
}

/// Creates or replaces a file with this content.
pub(crate) fn write_new_file(
    storage: &dyn Storage,
    path: &Path,
    bytes: &[u8],
) -> Result<(), FormatError> {
    let file = storage
        .create_file(path)
        .map_err(FormatError::io("Creating", path))?;
    storage
        .write_at(&file, path, 0, bytes)
        .map_err(FormatError::io("Writing", path))
}
