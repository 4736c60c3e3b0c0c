//! Writing into a guest's memfd from an address that only the kernel looks at.
#![expect(unsafe_code, reason = "the source is an address, not a slice")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::uffd::SourceAddr;

/// Copies `len` bytes at `src` (an address of ours) to byte `offset` of `file`; how many it were.
///
/// # Errors
/// As `pwrite(2)`; `EFAULT` when the source can't be read, for example because its file was cut.
pub fn write_from(file: &File, offset: u64, src: SourceAddr, len: u64) -> io::Result<u64> {
    // SAFETY: the kernel reads `len` bytes at that address and checks it; nothing here does.
    let written = unsafe {
        libc::pwrite(
            file.as_raw_fd(),
            src.0 as *const _,
            len as usize,
            offset as i64,
        )
    };
    u64::try_from(written).map_err(|_| io::Error::last_os_error())
}
