//! Telling a file system's device which of its blocks hold nothing.
#![expect(unsafe_code, reason = "one ioctl with a struct of ours")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// `struct fstrim_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
    min_len: u64,
}

const _: () = assert!(size_of::<Range>() == 24);

// _IOWR('X', 121, struct fstrim_range) in linux/fs.h.
nix::ioctl_readwrite!(fitrim, b'X', 121, Range);

/// Discards the free blocks of a file system, by any directory on it; gives their bytes.
///
/// # Errors
/// Where the file system or its device can't, and without CAP_SYS_ADMIN.
pub(crate) fn trim(directory: BorrowedFd<'_>) -> io::Result<u64> {
    let mut range = Range {
        start: 0,
        len: u64::MAX,
        min_len: 0,
    };
    // SAFETY: `range` is laid out as the kernel's struct (asserted above) and lives across the
    // call, which reads it and writes only its `len`.
    unsafe { fitrim(directory.as_raw_fd(), &raw mut range) }?;
    Ok(range.len)
}
