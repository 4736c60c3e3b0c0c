//! A data file mapped as a *source of copies*, never read by this process itself.
//!
//! The mapping is only ever an address that the kernel copies from. So nothing
//! here is a `&[u8]`, a truncated file can't raise `SIGBUS` in a worker, and
//! whether a page would block is asked (`mincore`) before the kernel is sent there.
//!
//! What is found resident is mapped at once (`MADV_POPULATE_READ`): copies from it take no
//! minor fault, reclaim takes it last, and `mincore` of it costs a tenth from then on.
#![expect(unsafe_code, reason = "mmap, madvise and mincore on raw addresses")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::uffd::SourceAddr;

/// Size of a page-cache page; `mincore` answers in these.
pub const CACHE_PAGE: u64 = 4096;
/// The largest page that is served.
pub const HUGE_PAGE: u64 = 2 << 20;
/// How much of a file is asked about at once.
pub const CHUNK_BYTES: u64 = 128 << 10;
const CHUNK_PAGES: usize = (CHUNK_BYTES / CACHE_PAGE) as usize;

/// Which page-cache pages of one chunk are resident, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkBits(u32);

const _: () = assert!(CHUNK_PAGES == u32::BITS as usize);

impl ChunkBits {
    /// Whether a page of the chunk is.
    #[must_use]
    pub fn has(self, page: u64) -> bool {
        self.0 >> page & 1 != 0
    }

    /// How many pages from `first` on are, without a gap, at most `wanted`.
    #[must_use]
    pub fn run_from(self, first: u64, wanted: u64) -> u64 {
        u64::from((self.0 >> first).trailing_ones()).min(wanted)
    }

    /// Whether all of them are.
    #[must_use]
    pub fn is_full(self) -> bool {
        self.0 == u32::MAX
    }

    /// From `mincore`'s byte per page, of which the lowest bit counts.
    fn pack(present: &[u8; CHUNK_PAGES]) -> Self {
        let mut bits = 0;
        for (page, byte) in present.iter().enumerate() {
            bits |= u32::from(byte & 1) << page;
        }
        Self(bits)
    }
}

/// A whole file, mapped shared and read-only for as long as this lives.
#[derive(Debug)]
pub struct SourceMapping {
    base: NonNull<libc::c_void>,
    len: u64,
    /// For each chunk, whether all of it was found resident and mapped.
    mapped: Box<[AtomicBool]>,
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
        let chunks = len.div_ceil(CHUNK_BYTES);
        Ok(Self {
            base,
            len,
            mapped: (0..chunks).map(|_| AtomicBool::new(false)).collect(),
        })
    }

    /// Which pages of a chunk are in the page cache now; those get mapped, too.
    ///
    /// # Panics
    /// The chunk lies outside the mapping.
    #[must_use]
    pub fn look_at_chunk(&self, chunk: u64) -> ChunkBits {
        let offset = chunk * CHUNK_BYTES;
        let len = CHUNK_BYTES.min(self.len - offset);
        let pages = len.div_ceil(CACHE_PAGE);
        let start = self.source(offset, len).0;
        let mut present = [0u8; CHUNK_PAGES];
        // SAFETY: the range lies in our mapping (asserted by `source`; chunks are page
        // aligned), and `present` has a byte for each page asked about.
        let result = unsafe { libc::mincore(start as *mut _, len as usize, present.as_mut_ptr()) };
        if result != 0 {
            return ChunkBits::default();
        }
        let bits = ChunkBits::pack(&present);
        // Two workers that do this at the same time do it twice, which is as well.
        let mapped = &self.mapped[chunk as usize];
        if !mapped.load(Ordering::Relaxed) {
            self.map_resident(start, bits, pages);
            mapped.store(bits.run_from(0, pages) == pages, Ordering::Relaxed);
        }
        bits
    }

    /// Maps the runs of a chunk that were just found resident.
    fn map_resident(&self, start: u64, bits: ChunkBits, pages: u64) {
        let mut page = 0;
        while page < pages {
            let run = bits.run_from(page, pages - page);
            if run > 0 {
                let at = start + page * CACHE_PAGE;
                // SAFETY: the run lies in our own read-only mapping; populating it reads
                // pages into page tables and changes no memory. A failure (a file cut
                // meanwhile) is found out by the copy.
                unsafe {
                    libc::madvise(
                        at as *mut _,
                        (run * CACHE_PAGE) as usize,
                        libc::MADV_POPULATE_READ,
                    )
                };
            }
            page += run + 1;
        }
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

/// Zeros of the largest page that is served, as a source of copies. They cost the machine
/// one page of memory: nothing is ever written there.
#[must_use]
pub fn zeros() -> SourceAddr {
    static ZEROS: OnceLock<usize> = OnceLock::new();
    let base = *ZEROS.get_or_init(|| {
        // SAFETY: a fresh read-only mapping at an address of the kernel's choice, which is
        // never unmapped.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                HUGE_PAGE as usize,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert!(
            base != libc::MAP_FAILED,
            "no address space for 2 MiB of zeros"
        );
        base as usize
    });
    SourceAddr(base as u64)
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

    /// The same without touching it: the first read of each slot pays for its memory.
    ///
    /// # Errors
    /// As `mmap(2)`.
    pub fn untouched(slots: usize, slot_bytes: usize) -> io::Result<Self> {
        let memory = memmap2::MmapMut::map_anon(slots * slot_bytes)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_of_a_chunk_has_its_own_bit() {
        for page in 0..CHUNK_PAGES {
            // What mincore leaves in the other bits doesn't count.
            let mut present = [0b10; CHUNK_PAGES];
            present[page] = 0b11;
            let bits = ChunkBits::pack(&present);
            for other in 0..CHUNK_PAGES {
                assert_eq!(bits.has(other as u64), other == page, "{page} {other}");
            }
        }
    }
}
