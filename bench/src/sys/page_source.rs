//! What the floors copy from: one hot page, or the build mapped as the engine maps it.
#![expect(unsafe_code, reason = "maps a file, and asks the kernel about it")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

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

/// Pages to copy from. All of them must be there: a page that isn't is an error.
#[derive(Debug)]
pub(crate) enum PageSource {
    /// The same page for every fault; it stays in the first-level cache.
    Hot(MmapMut),
    /// The page of the same number, wherever it is mapped.
    Mapped(Mmap),
    /// The same, after asking the kernel whether it is in the page cache.
    Asked(Mmap),
    /// The page of the same number, read into one hot page first.
    Read(File, MmapMut),
    /// The same, waiting for the disk.
    Direct(File, MmapMut),
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
    pub(crate) fn mapped(file: &File) -> io::Result<Self> {
        Ok(Self::Mapped(map(file)?))
    }

    /// All pages of a file, with a question before each.
    pub(crate) fn asked(file: &File) -> io::Result<Self> {
        Ok(Self::Asked(map(file)?))
    }

    /// All pages of a file, through a buffer.
    pub(crate) fn read(file: File) -> io::Result<Self> {
        Ok(Self::Read(file, MmapMut::map_anon(PAGE_BYTES)?))
    }

    /// All pages of a file, through a buffer that O_DIRECT takes.
    pub(crate) fn direct(file: File) -> io::Result<Self> {
        Ok(Self::Direct(file, MmapMut::map_anon(PAGE_BYTES)?))
    }

    /// Where the content of a page is; it stays there until the next call.
    pub(crate) fn page(&mut self, page: u64) -> io::Result<PageAddr> {
        let address = match self {
            Self::Hot(hot) => hot.as_ptr() as u64,
            Self::Mapped(file) => address_in(file, page),
            Self::Asked(file) => {
                let address = address_in(file, page);
                ask(address)?;
                address
            }
            Self::Read(file, buffer) => {
                read_now(file, page, buffer)?;
                buffer.as_ptr() as u64
            }
            Self::Direct(file, buffer) => {
                file.read_exact_at(buffer, page * PAGE_BYTES as u64)?;
                buffer.as_ptr() as u64
            }
        };
        Ok(PageAddr(address))
    }
}

fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the bytes are never looked at here; only their addresses go to the kernel,
    // which checks them itself should the file shrink.
    unsafe { Mmap::map(file) }
}

fn address_in(file: &Mmap, page: u64) -> u64 {
    let at = page as usize * PAGE_BYTES;
    assert!(at < file.len(), "page {page} is outside the build");
    file.as_ptr() as u64 + at as u64
}

fn ask(address: u64) -> io::Result<()> {
    let mut present = 0u8;
    // SAFETY: one page is asked about, and `present` has the one byte for it.
    let result = unsafe { libc::mincore(address as *mut _, PAGE_BYTES, &raw mut present) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if present & 1 == 0 {
        return Err(not_resident());
    }
    Ok(())
}

fn read_now(file: &File, page: u64, buffer: &mut MmapMut) -> io::Result<()> {
    let slot = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: PAGE_BYTES,
    };
    let offset = page as i64 * PAGE_BYTES as i64;
    // SAFETY: the one iovec is the whole of `buffer`, which is borrowed for the call.
    let n = unsafe {
        libc::preadv2(
            file.as_raw_fd(),
            &raw const slot,
            1,
            offset,
            libc::RWF_NOWAIT,
        )
    };
    match usize::try_from(n) {
        Ok(PAGE_BYTES) => Ok(()),
        Ok(_) => Err(not_resident()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn not_resident() -> io::Error {
    io::Error::other("the page is not in the page cache")
}
