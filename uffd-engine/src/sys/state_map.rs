//! A page-state table in shared memory: one byte per guest page, shared by the engine
//! (its only writer) and the daemon (which reads it at a pause, and keeps it when
//! an engine dies).
//!
//! In a memfd it lives as long as one of the two. In a file of a tmpfs it outlives both, and
//! whoever has it open or mapped holds a lock of it: who gets that lock knows that nobody serves
//! this memory any more, and can't write to the table later.
#![expect(unsafe_code, reason = "a shared mapping seen as atomics")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::AtomicU8;

use memmap2::MmapRaw;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs, statfs};
use nix::unistd::geteuid;

/// Who may read or write the file of a table: its user.
const MODE: u32 = 0o600;

/// One byte per page in shared memory.
#[derive(Debug)]
pub struct StateMap {
    shared: OwnedFd,
    map: MmapRaw,
    len: usize,
}

impl StateMap {
    /// A table of `pages` zero bytes. Its size is sealed, so no holder can turn
    /// another's access into `SIGBUS`.
    ///
    /// # Errors
    /// As `memfd_create(2)`, `ftruncate(2)` and `mmap(2)`.
    pub fn create(pages: usize) -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let memfd = memfd_create(c"thaw-page-states", flags)?;
        nix::unistd::ftruncate(&memfd, pages as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals))?;
        Self::map(memfd, pages)
    }

    /// A table of `pages` zero bytes in a new file of a tmpfs, and its lock.
    ///
    /// # Errors
    /// As `open(2)` and `mmap(2)`; there is no memory left in that tmpfs, or `Unsupported` where
    /// the directory is of no tmpfs.
    pub fn create_file(path: &Path, pages: usize) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(MODE)
            .open(path)?;
        Self::fill(file, pages).inspect_err(|_| {
            let _ = std::fs::remove_file(path);
        })
    }

    fn fill(file: File, pages: usize) -> io::Result<Self> {
        if !is_tmpfs(&file)? {
            return Err(io::ErrorKind::Unsupported.into());
        }
        file.try_lock()?;
        // All of it now: where a tmpfs is full, the first write to a page of a mapping is SIGBUS.
        fallocate(&file, FallocateFlags::empty(), 0, pages as i64)?;
        Self::map(file.into(), pages)
    }

    /// Maps the table in a file, whose other holders have all ended, and gets its lock.
    ///
    /// # Errors
    /// As `open(2)`; `WouldBlock` when somebody holds it still; as [`Self::from_fd`].
    pub fn open_file(path: &Path, pages: usize) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        file.try_lock()?;
        Self::from_fd(file.into(), pages)
    }

    /// Maps a table that another process made.
    ///
    /// # Errors
    /// `InvalidData` when it has not exactly `pages` bytes, or might have fewer at any time.
    pub fn from_fd(shared: OwnedFd, pages: usize) -> io::Result<Self> {
        let invalid = |text| io::Error::new(io::ErrorKind::InvalidData, text);
        if !stays_as_long(&shared)? {
            return Err(invalid(
                "the page-state table is neither sealed against shrinking nor a file of our own in a tmpfs",
            ));
        }
        if fstat(&shared)?.st_size != pages as i64 {
            return Err(invalid(
                "the page-state table has another size than the memory",
            ));
        }
        Self::map(shared, pages)
    }

    fn map(shared: OwnedFd, len: usize) -> io::Result<Self> {
        let map = memmap2::MmapOptions::new().len(len).map_raw(&shared)?;
        Ok(Self { shared, map, len })
    }

    /// The bytes, one per page.
    #[must_use]
    pub fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: the mapping is `len` bytes, lives as long as `self`, can't be truncated
        // (sealed, or by ourselves only, who never do), has all of its memory (a memfd's is
        // unlimited, a file's was allocated when it was made), and every access by any process
        // is a byte access through an atomic.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast(), self.len) }
    }
}

impl AsFd for StateMap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.as_fd()
    }
}

/// Whether nobody but us could make it shorter than it is. A memfd is sealed against that. The
/// memory of a file in a tmpfs is the file's as a memfd's is, whoever removes its name; and it is
/// cut short only by who may open it for writing, which is nobody but its owner: this user, who
/// makes such files with all of their memory and never changes their size.
fn stays_as_long(shared: &OwnedFd) -> io::Result<bool> {
    // Files of a tmpfs know seals, too, and others none.
    let seals = fcntl(shared, FcntlArg::F_GET_SEALS).unwrap_or(0);
    if SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Ok(true);
    }
    let about = fstat(shared)?;
    let is_file = about.st_mode & libc::S_IFMT == libc::S_IFREG;
    let is_ours = about.st_uid == geteuid().as_raw() && about.st_mode & 0o077 == 0;
    Ok(is_file && is_ours && is_tmpfs(shared)?)
}

fn is_tmpfs(file: impl AsFd) -> io::Result<bool> {
    Ok(fstatfs(file)?.filesystem_type() == TMPFS_MAGIC)
}

/// Whether tables can be files in this directory: it is of a tmpfs. Not of a ramfs, where nothing
/// is allocated ahead.
///
/// # Errors
/// As `statfs(2)`.
pub fn holds_files(dir: &Path) -> io::Result<bool> {
    Ok(statfs(dir)?.filesystem_type() == TMPFS_MAGIC)
}
