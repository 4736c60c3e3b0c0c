//! What the floors copy from: one hot page, or the build mapped as the engine maps it.
#![expect(unsafe_code, reason = "maps a file, and asks the kernel about it")]

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapMut};

const PAGE_BYTES: usize = 4096;

/// The address of a page of this process, for the kernel to copy from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageAddr(u64);

impl PageAddr {
    pub(crate) fn get(self) -> u64 {
        self.0
    }
}

/// Pages to copy from.
#[derive(Debug)]
pub(crate) enum PageSource {
    /// The same page for every fault; it stays in the first-level cache.
    Hot(MmapMut),
    /// The page of the same number.
    File(Mmap),
}

impl PageSource {
    /// One page that begins with this word.
    pub(crate) fn hot(word: u64) -> io::Result<Self> {
        let mut page = MmapMut::map_anon(PAGE_BYTES)?;
        for bytes in page.chunks_exact_mut(8) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Ok(Self::Hot(page))
    }

    /// All pages of a file.
    pub(crate) fn file(file: &File) -> io::Result<Self> {
        // SAFETY: the bytes are never looked at here; only their addresses go to the kernel,
        // which checks them itself should the file shrink.
        Ok(Self::File(unsafe { Mmap::map(file)? }))
    }

    /// Where the content of a page is.
    pub(crate) fn page(&self, page: u64) -> PageAddr {
        let address = match self {
            Self::Hot(hot) => hot.as_ptr() as u64,
            Self::File(file) => {
                let at = page as usize * PAGE_BYTES;
                assert!(at < file.len(), "page {page} is outside the build");
                file.as_ptr() as u64 + at as u64
            }
        };
        PageAddr(address)
    }

    /// Whether copying from a page would not have to wait for the disk.
    pub(crate) fn is_resident(&self, page: PageAddr) -> bool {
        let mut present = 0u8;
        // SAFETY: one page is asked about, and `present` has the one byte for it.
        let result = unsafe { libc::mincore(page.0 as *mut _, PAGE_BYTES, &raw mut present) };
        result == 0 && present & 1 != 0
    }
}
