//! Disks that are files: copies of whole ones, and whole ones made of a base and its changes.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::unistd::{Whence, lseek64};

use super::cow::{Changed, Changes};
use super::error::DiskError;
use crate::sys::reflink;
use crate::sys::ring_copy::{self, Piece};

/// How often a long copy says how far it is.
const REPORT_EVERY: Duration = Duration::from_secs(2);

/// Makes `to` a file that shares its blocks with `from`.
pub(super) fn reflink(from: &Path, to: &Path) -> Result<(), DiskError> {
    let cloned =
        File::open(from).and_then(|source| reflink::clone_file(&source, &File::create(to)?));
    undo(cloned, from, to)
}

/// Copies what is data; holes stay holes.
pub(super) fn sparse_copy(from: &Path, to: &Path) -> Result<(), DiskError> {
    let copied = File::open(from).and_then(|source| copy_data(&source, &File::create(to)?));
    undo(copied, from, to)
}

/// The cheapest copy that the file system can.
pub(super) fn cheapest_copy(from: &Path, to: &Path) -> Result<(), DiskError> {
    reflink(from, to).or_else(|_| sparse_copy(from, to))
}

/// A second name for a file that nobody will write, or a copy where there are too many already.
pub(super) fn link(from: &Path, to: &Path) -> Result<(), DiskError> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMLINK | libc::EXDEV)) => {
            cheapest_copy(from, to)
        }
        Err(error) => Err(DiskError::file("Linking the disk to", to)(error)),
    }
}

fn undo(copied: io::Result<()>, from: &Path, to: &Path) -> Result<(), DiskError> {
    copied.map_err(|source| {
        let _ = fs::remove_file(to);
        DiskError::Copy {
            from: from.to_owned(),
            to: to.to_owned(),
            source,
        }
    })
}

/// A standalone image of a base with its changes. Gives the bytes that were copied; holes of the
/// base stay holes.
///
/// The block device over both must be quiet, or be none.
///
/// # Errors
/// The changes can't be read, or an I/O error; nothing is left of the image.
pub fn flatten(base: &Path, cow: &Path, to: &Path) -> Result<u64, DiskError> {
    let opened = File::open(cow).map_err(DiskError::file("Opening", cow))?;
    let changes = Changes::read(&opened).map_err(|source| DiskError::Cow {
        path: cow.to_owned(),
        source,
    })?;
    let mut copied = 0;
    let written = File::open(base).and_then(|base| {
        let target = File::create(to)?;
        let length = base.metadata()?.len();
        target.set_len(length)?;
        let unchanged = data_pieces(&base, length)?;
        let changed = changed_pieces(&changes, length)?;
        let bytes = |pieces: &[Piece]| pieces.iter().map(|piece| piece.bytes).sum::<u64>();
        let mut report = Report::new(to, bytes(&unchanged) + bytes(&changed));
        copied += ring_copy::copy(&base, &target, unchanged, &mut |bytes| report.add(bytes))?;
        copied += ring_copy::copy(&opened, &target, changed, &mut |bytes| report.add(bytes))?;
        Ok(())
    });
    undo(written, base, to)?;
    Ok(copied)
}

/// Where a file has data.
fn data_pieces(file: &File, length: u64) -> io::Result<Vec<Piece>> {
    let (mut pieces, mut at) = (Vec::new(), 0);
    while let Some((start, end)) = next_data(file, at, length)? {
        pieces.push(Piece {
            from: start,
            to: start,
            bytes: end - start,
        });
        at = end;
    }
    Ok(pieces)
}

/// The changed chunks of a disk of `length` bytes, neighbours as one.
fn changed_pieces(changes: &Changes, length: u64) -> io::Result<Vec<Piece>> {
    let mut pieces: Vec<Piece> = Vec::new();
    for Changed { at, stored_at } in changes.changed.iter().copied() {
        let Some(bytes) = length.checked_sub(at).filter(|bytes| *bytes > 0) else {
            let problem = format!("a change at byte {at} of a disk of {length}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        };
        let bytes = bytes.min(changes.chunk_bytes);
        match pieces.last_mut() {
            Some(last) if last.to + last.bytes == at && last.from + last.bytes == stored_at => {
                last.bytes += bytes;
            }
            _ => pieces.push(Piece {
                from: stored_at,
                to: at,
                bytes,
            }),
        }
    }
    Ok(pieces)
}

/// The next run of data: its start and end.
fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= length {
        return Ok(None);
    }
    let start = match lseek64(file, at as i64, Whence::SeekData) {
        Ok(start) => start as u64,
        Err(nix::Error::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = lseek64(file, start as i64, Whence::SeekHole)? as u64;
    Ok((start < length).then_some((start, end.min(length))))
}

/// Copies inside the kernel.
fn copy_data(source: &File, target: &File) -> io::Result<()> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut at = 0;
    while let Some((start, end)) = next_data(source, at, length)? {
        copy_range(source, target, start, end)?;
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

/// Says how far a long copy is.
struct Report<'a> {
    path: &'a Path,
    done: u64,
    total: u64,
    next: Instant,
}

impl<'a> Report<'a> {
    fn new(path: &'a Path, total: u64) -> Self {
        Self {
            path,
            done: 0,
            total,
            next: Instant::now() + REPORT_EVERY,
        }
    }

    fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if Instant::now() >= self.next {
            self.next = Instant::now() + REPORT_EVERY;
            let (done_mb, total_mb) = (self.done >> 20, self.total >> 20);
            tracing::info!(path = %self.path.display(), done_mb, total_mb, "Flattening a disk");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::disks::cow;

    fn image_with_holes(path: &Path) {
        let file = File::create(path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[7; 10_000], 1 << 20).unwrap();
        file.write_all_at(&[9; 3], (8 << 20) - 3).unwrap();
    }

    fn is_sparse(path: &Path) -> bool {
        fs::metadata(path).unwrap().blocks() * 512 < 1 << 20
    }

    #[test]
    fn a_copy_is_equal_and_keeps_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        image_with_holes(&from);
        sparse_copy(&from, &to).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(is_sparse(&to), "holes were filled");
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
        sparse_copy(&from, &to).unwrap();
        assert!(fs::read(&to).unwrap() == content);
        fs::remove_file(&to).unwrap();
        link(&from, &to).unwrap();
        assert!(fs::read(&to).unwrap() == content, "no link, but a copy");
    }

    #[test]
    fn a_failed_copy_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("b");
        let error = sparse_copy(&dir.path().join("missing"), &to).unwrap_err();
        assert!(error.to_string().contains("missing"));
        assert!(!to.exists());
    }

    #[test]
    fn a_flattened_disk_is_its_base_with_the_changes() {
        let dir = tempfile::tempdir().unwrap();
        let [base, changes, whole] = ["base", "cow", "whole"].map(|name| dir.path().join(name));
        image_with_holes(&base);
        // Neighbours, one over data of the base, and the last chunk, which the base has in part.
        File::options()
            .write(true)
            .open(&base)
            .unwrap()
            .set_len((8 << 20) - 1024)
            .unwrap();
        let changed: Vec<(u64, Vec<u8>)> = [5, 6, 256, 2047]
            .map(|chunk| (chunk, vec![chunk as u8 | 1; 4096]))
            .to_vec();
        cow::tests::write(
            &File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&changes)
                .unwrap(),
            &changed,
        );
        let copied = flatten(&base, &changes, &whole).unwrap();
        let mut expected = fs::read(&base).unwrap();
        for (chunk, content) in &changed {
            let at = *chunk as usize * 4096;
            let end = (at + 4096).min(expected.len());
            expected[at..end].copy_from_slice(&content[..end - at]);
        }
        assert!(fs::read(&whole).unwrap() == expected);
        assert!(is_sparse(&whole), "holes were filled");
        assert!(copied < 100_000, "{copied} bytes were copied");
    }

    #[test]
    fn a_change_behind_the_disks_end_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let [base, changes, whole] = ["base", "cow", "whole"].map(|name| dir.path().join(name));
        image_with_holes(&base);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&changes);
        cow::tests::write(&file.unwrap(), &[(2048, vec![1; 4096])]);
        let error = flatten(&base, &changes, &whole).unwrap_err();
        assert!(uffd_engine::chain(&error).contains("8388608"), "{error:?}");
        assert!(!whole.exists());
    }
}
