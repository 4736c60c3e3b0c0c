//! `FICLONE`: a copy that shares its blocks until either side writes.
#![expect(unsafe_code, reason = "the ioctl has no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Makes `to` share all of `from`'s blocks.
///
/// # Errors
/// The file system can't (`EOPNOTSUPP`), or they are on different ones (`EXDEV`).
pub fn clone_file(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: FICLONE takes a descriptor by value.
    let result = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
