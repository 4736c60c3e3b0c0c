//! Writing into a guest's memfd from an address that only the kernel looks at.
//!
//! `pwrite(2)` does that for small pages. A memfd of huge pages takes no writes: there the page is
//! made (`fallocate(2)`) and filled through a mapping of ours, again by the kernel
//! (`process_vm_readv(2)` of this process), so that a source which can't be read is an error and
//! not a signal. Whoever maps the memfd sees a page when it is made, and not when it is filled: it
//! must not look before it is told to.
#![expect(unsafe_code, reason = "source and target are addresses, not slices")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};

use super::guest_memory::page_bytes_of;
use super::mapping::{CACHE_PAGE, HUGE_PAGE, zeros};
use super::uffd::SourceAddr;

/// A guest's memory in a memfd.
#[derive(Debug)]
pub struct GuestFile {
    file: File,
    /// Of one of huge pages.
    mapped: Option<Mapped>,
}

#[derive(Debug)]
struct Mapped {
    base: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: an address that only the kernel follows; nothing here holds a reference into it.
unsafe impl Send for Mapped {}

impl GuestFile {
    /// Takes a memfd of at least `len` bytes.
    ///
    /// # Errors
    /// As `fstat(2)` and `mmap(2)`.
    pub fn new(file: File, len: u64) -> io::Result<Self> {
        let is_huge = page_bytes_of(file.as_fd())? > CACHE_PAGE;
        let mapped = is_huge.then(|| Mapped::new(&file, len as usize));
        Ok(Self {
            mapped: mapped.transpose()?,
            file,
        })
    }

    /// Copies `len` bytes at `src` (an address of ours) to byte `offset`; how many it were.
    ///
    /// # Errors
    /// As `pwrite(2)`, and `ENOSPC` when there is no huge page left; `EFAULT` when the source
    /// can't be read, for example because its file was cut.
    pub fn write_from(&self, offset: u64, src: SourceAddr, len: u64) -> io::Result<u64> {
        let written = match &self.mapped {
            None => {
                // SAFETY: the kernel reads `len` bytes at that address and checks it; nothing
                // here does.
                unsafe {
                    libc::pwrite(
                        self.file.as_raw_fd(),
                        src.0 as *const _,
                        len as usize,
                        offset as i64,
                    )
                }
            }
            Some(mapped) => {
                self.make(offset, len)?;
                mapped.fill(offset, src, len)
            }
        };
        u64::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Makes zeros of `len` bytes from byte `offset` on where there is nothing; how many it were.
    ///
    /// # Errors
    /// As [`Self::write_from`].
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<u64> {
        if self.mapped.is_none() {
            // A page that is only made would not do: what maps it afterwards has to find it whole.
            return self.write_from(offset, zeros(), len.min(HUGE_PAGE));
        }
        // Such a page is zero when it is made; one that is there stays as its guest has it.
        self.make(offset, len)?;
        Ok(len)
    }

    fn make(&self, offset: u64, len: u64) -> io::Result<()> {
        let kept = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, kept, offset as i64, len as i64)?)
    }

    /// Whether there is no page at a place, or a page of zeros where that is the same to whoever
    /// asks for it: huge pages tell no more.
    #[must_use]
    pub fn is_hole(&self, offset: u64, len: u64) -> bool {
        if self.mapped.is_none() {
            let at = offset as i64;
            return lseek64(&self.file, at, Whence::SeekData) != Ok(at);
        }
        let mut bytes = [0; CACHE_PAGE as usize];
        (0..len / CACHE_PAGE).all(|part| {
            let read = self
                .file
                .read_exact_at(&mut bytes, offset + part * CACHE_PAGE);
            read.is_ok() && bytes.iter().all(|byte| *byte == 0)
        })
    }
}

impl AsFd for GuestFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Mapped {
    fn new(file: &File, len: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // Whoever made it has a right to its pages, or will be told that there are none.
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                flags,
                file.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(base) {
            Some(base) if base.as_ptr() != libc::MAP_FAILED => Ok(Self { base, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn fill(&self, offset: u64, src: SourceAddr, len: u64) -> isize {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.len as u64) {
            nix::Error::EINVAL.set();
            return -1;
        }
        let there = libc::iovec {
            // SAFETY: in bounds, as just asked.
            iov_base: unsafe { self.base.as_ptr().byte_add(offset as usize) },
            iov_len: len as usize,
        };
        let here = libc::iovec {
            iov_base: src.0 as *mut _,
            iov_len: len as usize,
        };
        // SAFETY: the kernel reads and writes `len` bytes at these addresses and checks them; the
        // target is a mapping of ours that nothing refers to.
        unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const there, 1, &raw const here, 1, 0)
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`.
        unsafe { libc::munmap(self.base.as_ptr(), self.len) };
    }
}
