//! Memory that plays a guest's: mapped here, served by an engine elsewhere.
#![expect(
    unsafe_code,
    reason = "memory that another process fills has no Rust owner"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use super::mapping::{CACHE_PAGE, HUGE_PAGE};
use super::uffd::Uffd;
use crate::address::HostAddr;
use crate::region::ClaimedRegion;

/// The size of the pages that a file's mappings have: of a memfd of huge pages, theirs, which is
/// its block size.
///
/// # Errors
/// As `fstat(2)`.
pub fn page_bytes_of(file: BorrowedFd<'_>) -> io::Result<u64> {
    let blocks = nix::sys::stat::fstat(file)?.st_blksize as u64;
    Ok(if blocks == HUGE_PAGE {
        HUGE_PAGE
    } else {
        CACHE_PAGE
    })
}

/// A mapping whose pages appear when they are touched. Reads and writes are volatile:
/// what is behind them changes under our feet.
#[derive(Debug)]
pub struct GuestMemory {
    base: NonNull<u8>,
    len: u64,
    page_bytes: u64,
}

// SAFETY: the mapping is plain memory; all access is by volatile bytes and words.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; concurrent volatile access may tear, which its users check for by
// content, but can't break an invariant of this process.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Private anonymous memory, as Firecracker's.
    ///
    /// # Errors
    /// As `mmap(2)`.
    pub fn anonymous(len: u64) -> io::Result<Self> {
        Self::map(
            len,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
        )
    }

    /// Private anonymous memory of 2 MiB pages, as Firecracker's with `huge_pages`.
    ///
    /// # Errors
    /// As `mmap(2)`: `ENOMEM` when no such pages are reserved or allowed.
    pub fn huge(len: u64) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let mut memory = Self::map(len, flags | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB, -1)?;
        memory.page_bytes = HUGE_PAGE;
        Ok(memory)
    }

    /// A shared mapping of a memfd, as QEMU's, in pages of its size.
    ///
    /// # Errors
    /// As `mmap(2)`.
    pub fn shared(file: &File, len: u64) -> io::Result<Self> {
        let mut memory = Self::map(len, libc::MAP_SHARED, file.as_raw_fd())?;
        memory.page_bytes = page_bytes_of(file.as_fd())?;
        Ok(memory)
    }

    fn map(len: u64, flags: i32, fd: i32) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), len as usize, protection, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap at null"))?;
        Ok(Self {
            base,
            len,
            page_bytes: CACHE_PAGE,
        })
    }

    /// Registers all of it for missing faults.
    ///
    /// # Errors
    /// As `UFFDIO_REGISTER`.
    pub fn register(&self, uffd: &Uffd) -> io::Result<()> {
        uffd.register_missing(self.base(), self.len)
    }

    /// Where it is mapped.
    #[must_use]
    pub fn base(&self) -> HostAddr {
        HostAddr::new(self.base.as_ptr() as u64)
    }

    /// As one region that is all of the snapshot's memory.
    #[must_use]
    pub fn as_region(&self) -> ClaimedRegion {
        ClaimedRegion {
            base: self.base().get(),
            size: self.len,
            offset: 0,
            page_size: self.page_bytes,
        }
    }

    /// Reads the word at a byte offset (a multiple of 8), waiting for its page if need be.
    ///
    /// # Panics
    /// The offset is outside, or unaligned.
    #[must_use]
    pub fn read(&self, offset: u64) -> u64 {
        let at = self.word(offset);
        // SAFETY: `word` checked bounds and alignment; the mapping lives as long as `self`.
        unsafe { at.read_volatile() }
    }

    /// Writes the word at a byte offset.
    ///
    /// # Panics
    /// As [`Self::read`].
    pub fn write(&self, offset: u64, value: u64) {
        let at = self.word(offset);
        // SAFETY: as in `read`.
        unsafe { at.write_volatile(value) }
    }

    /// Touches the byte at an offset through a system call, so that a page that can't be
    /// had is an error here and not a signal.
    ///
    /// # Errors
    /// `EFAULT` for a poisoned page.
    ///
    /// # Panics
    /// The offset is outside.
    pub fn probe(&self, offset: u64) -> io::Result<()> {
        assert!(offset < self.len, "byte at {offset:#x}");
        let (_read, write) = nix::unistd::pipe()?;
        // SAFETY: one byte inside the mapping, read by the kernel, which checks the access.
        let written = unsafe {
            libc::write(
                write.as_raw_fd(),
                self.base.as_ptr().add(offset as usize).cast(),
                1,
            )
        };
        if written == 1 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn word(&self, offset: u64) -> *mut u64 {
        assert!(
            offset.is_multiple_of(8) && offset + 8 <= self.len,
            "word at {offset:#x}"
        );
        // SAFETY: in bounds, as just asserted.
        unsafe { self.base.as_ptr().add(offset as usize).cast() }
    }

    /// Gives a range back (`MADV_DONTNEED`), which the holder of the userfaultfd is told
    /// of before this returns.
    ///
    /// # Errors
    /// As `madvise(2)`.
    pub fn give_back(&self, offset: u64, len: u64) -> io::Result<()> {
        assert!(offset + len <= self.len, "range {offset:#x}+{len:#x}");
        // SAFETY: the range is inside the mapping, and nothing holds a reference into it.
        let result = unsafe {
            libc::madvise(
                self.base.as_ptr().add(offset as usize).cast(),
                len as usize,
                libc::MADV_DONTNEED,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len as usize) };
    }
}
