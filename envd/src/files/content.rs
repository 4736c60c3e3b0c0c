//! A file that is opened to be read: only what is a file.

use std::fs::File;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};

use crate::filesystem::{FileError, GuestPath};

/// An open file, and what it was like when it was opened.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) file: File,
    pub(super) size: u64,
    /// An entity tag: another one when the file is another one, or was changed.
    pub(super) tag: String,
}

/// Opens a file, following links but not magic ones.
pub(super) fn open(path: &GuestPath) -> Result<Content, FileError> {
    let failed = |errno| FileError::new("Reading", path.as_str(), errno);
    // Without O_NONBLOCK, a named pipe would hold us up until somebody writes to it.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::NO_MAGICLINKS;
    let file = openat2(CWD, path.as_str(), flags, Mode::empty(), resolve).map_err(failed)?;
    let stat = fstat(&file).map_err(failed)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(FileError::IsADirectory(path.to_string())),
        _ => {
            return Err(FileError::Unsuitable {
                path: path.to_string(),
                reason: "not a regular file",
            });
        }
    }
    Ok(Content {
        file: File::from(file),
        size: u64::try_from(stat.st_size).unwrap_or_default(),
        tag: format!(
            "\"{:x}-{:x}.{:x}-{:x}\"",
            stat.st_ino, stat.st_mtime, stat.st_mtime_nsec, stat.st_size
        ),
    })
}
