//! `PAGEMAP_SCAN`: which pages of a process were written since they were write-protected.
//!
//! Source: `linux/fs.h` (6.7 and later), `Documentation/admin-guide/mm/pagemap.rst`.
#![expect(unsafe_code, reason = "the ioctl takes addresses of buffers")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::address::HostAddr;

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96);
const _: () = assert!(size_of::<PageRegion>() == 24);

const PAGE_IS_WPALLOWED: u64 = 1 << 0;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// Fewer than the kernel's own buffer of 512: a scan that ends with more than that returns a
/// `walk_end` that lies behind, and its last ranges would be counted twice.
const RANGES: usize = 512;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong =
    (3 << 30 | (size_of::<ScanArg>() << 16) | ((b'f' as usize) << 8) | 16) as libc::c_ulong;

/// Ranges of addresses, each from the first byte to the one past the last.
pub type Ranges = Vec<(HostAddr, HostAddr)>;

/// The ranges of pages that are there and were written, in a range of the process whose
/// `/proc/PID/pagemap` this is. Memory that isn't write-protected asynchronously has none.
///
/// # Errors
/// As the ioctl.
pub fn written(pagemap: &File, start: HostAddr, len: u64) -> io::Result<Ranges> {
    scan(pagemap, start, len, 0)
}

/// The same for pages that are there and still protected.
///
/// # Errors
/// As the ioctl.
pub fn unwritten(pagemap: &File, start: HostAddr, len: u64) -> io::Result<Ranges> {
    scan(pagemap, start, len, PAGE_IS_WRITTEN)
}

fn scan(pagemap: &File, start: HostAddr, len: u64, inverted: u64) -> io::Result<Ranges> {
    let mut found = Vec::new();
    let mut buffer = [PageRegion::default(); RANGES];
    let end = start.get() + len;
    let mut at = start.get();
    while at < end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: 0,
            start: at,
            end,
            walk_end: 0,
            vec: buffer.as_mut_ptr() as u64,
            vec_len: RANGES as u64,
            max_pages: 0,
            category_inverted: inverted,
            category_mask: PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_WRITTEN,
        };
        // SAFETY: `arg` is exclusively borrowed and names a buffer of `vec_len` records,
        // which outlives the call.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        let ranges = buffer[..count].iter();
        found.extend(ranges.map(|range| (HostAddr::new(range.start), HostAddr::new(range.end))));
        if count < RANGES {
            break;
        }
        at = arg.walk_end;
    }
    Ok(found)
}
