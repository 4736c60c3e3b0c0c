//! The size of a terminal.
#![expect(unsafe_code, reason = "an ioctl of terminals")]

use std::os::fd::{AsRawFd, BorrowedFd};

/// Columns and rows, if it is one and knows.
#[must_use]
pub fn size(terminal: BorrowedFd<'_>) -> Option<(u16, u16)> {
    // SAFETY: `winsize` is plain data, valid as zeros.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: TIOCGWINSZ writes one `winsize`, which outlives the call.
    let asked = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (asked == 0 && size.ws_col > 0).then_some((size.ws_col, size.ws_row))
}
