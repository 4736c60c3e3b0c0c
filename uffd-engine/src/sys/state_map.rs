//! A page-state table in a memfd: one byte per guest page, shared by the engine
//! (its only writer) and the daemon (which reads it at a pause, and keeps it when
//! an engine dies).
#![expect(unsafe_code, reason = "a shared mapping seen as atomics")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU8;

use memmap2::MmapRaw;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// One byte per page in shared memory.
#[derive(Debug)]
pub struct StateMap {
    memfd: OwnedFd,
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

    /// Maps a table that another process made.
    ///
    /// # Errors
    /// `InvalidData` when it isn't a sealed memfd of exactly `pages` bytes.
    pub fn from_fd(memfd: OwnedFd, pages: usize) -> io::Result<Self> {
        let invalid = |text| io::Error::new(io::ErrorKind::InvalidData, text);
        let seals = fcntl(&memfd, FcntlArg::F_GET_SEALS)
            .map_err(|_| invalid("the page-state table is not a memfd"))?;
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(invalid(
                "the page-state table is not sealed against shrinking",
            ));
        }
        if nix::sys::stat::fstat(&memfd)?.st_size != pages as i64 {
            return Err(invalid(
                "the page-state table has another size than the memory",
            ));
        }
        Self::map(memfd, pages)
    }

    fn map(memfd: OwnedFd, len: usize) -> io::Result<Self> {
        let map = memmap2::MmapOptions::new().len(len).map_raw(&memfd)?;
        Ok(Self { memfd, map, len })
    }

    /// The bytes, one per page.
    #[must_use]
    pub fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: the mapping is `len` bytes, lives as long as `self`, can't be truncated
        // (sealed), and every access by any process is a byte access through an atomic.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast(), self.len) }
    }
}

impl AsFd for StateMap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}
