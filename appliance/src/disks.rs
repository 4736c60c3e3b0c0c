//! A sandbox's own copy of a disk image: shared blocks where the file system can, else a
//! copy that skips holes. Decided once at start, by trying.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Whence, lseek64};
use thiserror::Error;

use crate::sys::reflink;

/// How disks are copied on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMethod {
    /// `FICLONE`.
    Reflink,
    /// Data is copied, holes stay holes.
    Sparse,
}

/// The method and why it was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disks {
    /// How.
    pub method: CopyMethod,
    /// Why.
    pub reason: String,
}

/// Why a copy was not made.
#[derive(Debug, Error)]
#[error("Copying disk {} to {}", from.display(), to.display())]
pub struct DiskError {
    /// The image.
    pub from: PathBuf,
    /// The copy; nothing is left of it.
    pub to: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

impl Disks {
    /// Tries a reflink in the data directory.
    ///
    /// # Errors
    /// The directory can't be written.
    pub fn probe(data_dir: &Path) -> io::Result<Self> {
        let (from, to) = (data_dir.join(".probe-from"), data_dir.join(".probe-to"));
        fs::write(&from, [1u8; 4096])?;
        let tried =
            File::create(&to).and_then(|target| reflink::clone_file(&File::open(&from)?, &target));
        let _ = fs::remove_file(&from);
        let _ = fs::remove_file(&to);
        Ok(match tried {
            Ok(()) => Self {
                method: CopyMethod::Reflink,
                reason: "reflink: the data directory's file system shares blocks".into(),
            },
            Err(error) => Self {
                method: CopyMethod::Sparse,
                reason: format!("sparse copy, because the data directory can't reflink ({error})"),
            },
        })
    }

    /// Copies an image. Blocks; call it off the shard's thread.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn copy(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        let copied = match self.method {
            CopyMethod::Reflink => {
                File::open(from).and_then(|source| reflink::clone_file(&source, &File::create(to)?))
            }
            CopyMethod::Sparse => sparse_copy(from, to),
        };
        copied.map_err(|source| {
            let _ = fs::remove_file(to);
            DiskError {
                from: from.to_owned(),
                to: to.to_owned(),
                source,
            }
        })
    }
}

/// Copies what is data, inside the kernel.
fn sparse_copy(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = File::create(to)?;
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut at = 0;
    while at < len {
        let data = match lseek64(&source, at as i64, Whence::SeekData) {
            Ok(data) => data as u64,
            Err(nix::Error::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = (lseek64(&source, data as i64, Whence::SeekHole)? as u64).min(len);
        copy_range(&source, &target, data, end)?;
        at = end;
    }
    Ok(())
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let (mut from, mut to) = (at as i64, at as i64);
        let wanted = (end - at) as usize;
        let copied = match nix::fcntl::copy_file_range(
            source,
            Some(&mut from),
            target,
            Some(&mut to),
            wanted,
        ) {
            // Image and copy lie on different file systems.
            Err(nix::Error::EXDEV) => copy_through_memory(source, target, at, end)?,
            copied => copied?,
        };
        if copied == 0 {
            let name = format!("descriptor {} ended at byte {at}", source.as_raw_fd());
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, name));
        }
        at += copied as u64;
    }
    Ok(())
}

/// The first part of a range, as much as fits into a buffer; 0 at the source's end.
fn copy_through_memory(source: &File, target: &File, start: u64, end: u64) -> io::Result<usize> {
    let mut buffer = vec![0; (end - start).min(1 << 20) as usize];
    let read = source.read_at(&mut buffer, start)?;
    target.write_all_at(&buffer[..read], start)?;
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_is_equal_and_keeps_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[7; 10_000], 1 << 20).unwrap();
        file.write_all_at(&[9; 3], (8 << 20) - 3).unwrap();
        let disks = Disks {
            method: CopyMethod::Sparse,
            reason: String::new(),
        };
        disks.copy(&from, &to).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(
            fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20,
            "holes were filled"
        );
    }

    #[test]
    fn a_copy_may_go_to_another_file_system() {
        let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else {
            return println!("skipped: a_copy_may_go_to_another_file_system: no /dev/shm");
        };
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), elsewhere.path().join("b"));
        let content: Vec<u8> = (0..3 << 20).map(|n: u32| (n / 7) as u8).collect();
        fs::write(&from, &content).unwrap();
        let disks = Disks {
            method: CopyMethod::Sparse,
            reason: String::new(),
        };
        disks.copy(&from, &to).unwrap();
        assert!(fs::read(&to).unwrap() == content);
    }

    #[test]
    fn a_failed_copy_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks {
            method: CopyMethod::Sparse,
            reason: String::new(),
        };
        let to = dir.path().join("b");
        let error = disks.copy(&dir.path().join("missing"), &to).unwrap_err();
        assert!(error.to_string().contains("missing"));
        assert!(!to.exists());
    }
}
