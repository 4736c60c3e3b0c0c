//! A data file mapped as a *source of copies*, never read by this process itself.
//!
//! The mapping is only ever an address that the kernel copies from. So nothing
//! here is a `&[u8]`, a truncated file can't raise `SIGBUS` in a worker, and
//! whether a page would block is asked (`mincore`) before the kernel is sent there.
#![expect(unsafe_code, reason = "mmap and mincore on raw addresses")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use super::uffd::SourceAddr;

/// Size of a page-cache page; `mincore` answers in these.
const CACHE_PAGE: u64 = 4096;

/// A whole file, mapped shared and read-only for as long as this lives.
#[derive(Debug)]
pub struct SourceMapping {
    base: NonNull<libc::c_void>,
    len: u64,
}

// SAFETY: the mapping is never dereferenced or written, only its address is handed
// to the kernel, which may be done from any thread.
unsafe impl Send for SourceMapping {}
// SAFETY: as above; all methods take `&self` and change nothing.
unsafe impl Sync for SourceMapping {}

impl SourceMapping {
    /// Maps the first `len` bytes of `file`.
    ///
    /// # Errors
    /// As `mmap(2)`; `len` of zero is `InvalidInput`.
    pub fn new(file: &File, len: u64) -> io::Result<Self> {
        // SAFETY: a fresh shared read-only mapping at an address of the kernel's choice
        // touches no memory that Rust knows of.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base).ok_or_else(|| io::Error::other("mmap returned null"))?;
        Ok(Self { base, len })
    }

    /// The address of byte `offset`, for [`super::uffd::Uffd::copy`].
    ///
    /// # Panics
    /// `offset..offset + len` leaves the mapping: the caller's map was not validated.
    #[must_use]
    pub fn source(&self, offset: u64, len: u64) -> SourceAddr {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "copy source {offset:#x}+{len:#x} leaves a mapping of {:#x} bytes",
            self.len
        );
        SourceAddr(self.base.as_ptr() as u64 + offset)
    }

    /// How many bytes from `offset` on (at most `len`) are in the page cache now.
    /// A page evicted between this and the copy costs a wait, not correctness.
    ///
    /// # Panics
    /// As [`Self::source`].
    #[must_use]
    pub fn resident_prefix(&self, offset: u64, len: u64) -> u64 {
        const PROBE: usize = 512;
        let start = self.source(offset, len).0;
        let pages = len.div_ceil(CACHE_PAGE).min(PROBE as u64);
        let mut present = [0u8; PROBE];
        // SAFETY: the range lies in our mapping (asserted by `source`; its start is page
        // aligned as all offsets are), and `present` has a byte for each page asked about.
        let result = unsafe {
            libc::mincore(
                start as *mut _,
                (pages * CACHE_PAGE) as usize,
                present.as_mut_ptr(),
            )
        };
        if result != 0 {
            return 0;
        }
        let resident = present[..pages as usize]
            .iter()
            .take_while(|byte| **byte & 1 != 0)
            .count();
        (resident as u64 * CACHE_PAGE).min(len)
    }
}

impl Drop for SourceMapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no address of it outlives `self`
        // except as a number that the kernel would refuse.
        unsafe { libc::munmap(self.base.as_ptr(), self.len as usize) };
    }
}

/// Read buffers lent to the kernel: one allocation, cut into equal slots. The ring's
/// owner keeps it alive until every read has completed.
#[derive(Debug)]
pub struct ReadBuffers {
    memory: memmap2::MmapMut,
    slot_bytes: usize,
}

impl ReadBuffers {
    /// Allocates `slots` buffers of `slot_bytes` each, aligned for O_DIRECT.
    ///
    /// # Errors
    /// As `mmap(2)`.
    pub fn new(slots: usize, slot_bytes: usize) -> io::Result<Self> {
        let mut memory = memmap2::MmapMut::map_anon(slots * slot_bytes)?;
        // Touch it now, not in the first faults.
        memory.fill(0);
        Ok(Self { memory, slot_bytes })
    }

    /// How many slots there are.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.memory.len() / self.slot_bytes
    }

    /// Bytes of one slot.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// The slot as the kernel is told of it.
    #[must_use]
    pub fn pointer(&mut self, slot: usize) -> *mut u8 {
        self.memory[slot * self.slot_bytes..].as_mut_ptr()
    }

    /// The slot as the source of a copy.
    #[must_use]
    pub fn source(&self, slot: usize) -> SourceAddr {
        SourceAddr(self.memory[slot * self.slot_bytes..].as_ptr() as u64)
    }

    /// The whole allocation, to be registered with a ring.
    #[must_use]
    pub fn as_iovec(&mut self) -> libc::iovec {
        libc::iovec {
            iov_base: self.memory.as_mut_ptr().cast(),
            iov_len: self.memory.len(),
        }
    }
}
