//! Asking the kernel to begin with what an fsync would wait for.

#![expect(unsafe_code, reason = "nix has no sync_file_range")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc::{SYNC_FILE_RANGE_WRITE, off64_t, sync_file_range};

/// Starts writing dirty pages of a range to the disk, and doesn't wait for it.
pub(crate) fn start_writeback(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let (offset, bytes) = (position(offset)?, position(bytes)?);
    // SAFETY: the call takes numbers only; the descriptor is open as long as `file` is.
    let result = unsafe { sync_file_range(file.as_raw_fd(), offset, bytes, SYNC_FILE_RANGE_WRITE) };
    Errno::result(result)?;
    Ok(())
}

fn position(bytes: u64) -> io::Result<off64_t> {
    off64_t::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}
