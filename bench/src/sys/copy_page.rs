//! The floor's system calls: read one fault, copy one page.
//!
//! Spelled out once more, and not taken from `uffd-engine`: a baseline that shares code with
//! what it is compared to gets slower together with it.
//!
//! Source: `linux/userfaultfd.h` (6.18).
#![expect(unsafe_code, reason = "userfaultfd has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::page_source::PageAddr;

const EVENT_PAGEFAULT: u8 = 0x12;
/// `_IOWR(0xAA, 0x03, struct uffdio_copy)`.
const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
/// `_IOWR(0xAA, 0x07, struct uffdio_continue)`.
const UFFDIO_CONTINUE: libc::c_ulong = 0xC020_AA07;
const PAGE_BYTES: u64 = 4096;

/// `struct uffd_msg`.
#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    rest: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_continue`.
#[repr(C)]
struct Continue {
    start: u64,
    len: u64,
    mode: u64,
    mapped: i64,
}

const _: () = assert!(size_of::<Continue>() == 32);
const _: () = assert!(size_of::<Message>() == 32);
const _: () = assert!(size_of::<Copy>() == 40);

/// Reads one event: the address of a fault, or `None` for any other event or none at all.
pub(crate) fn read_fault(uffd: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let mut message = Message::default();
    // SAFETY: the kernel writes at most the 32 bytes of `message`, plain data that is valid
    // for every bit pattern.
    let n = unsafe {
        libc::read(
            uffd.as_raw_fd(),
            (&raw mut message).cast(),
            size_of::<Message>(),
        )
    };
    if n < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock => Ok(None),
            _ => Err(error),
        };
    }
    Ok((message.event == EVENT_PAGEFAULT).then_some(message.address))
}

/// Installs the page at `from` at the page of `address` and wakes who waits for it.
pub(crate) fn copy_page(uffd: BorrowedFd<'_>, address: u64, from: PageAddr) -> io::Result<()> {
    copy_pages(uffd, address & !(PAGE_BYTES - 1), from, PAGE_BYTES)
}

/// Installs `len` bytes of consecutive pages.
pub(crate) fn copy_pages(
    uffd: BorrowedFd<'_>,
    address: u64,
    from: PageAddr,
    len: u64,
) -> io::Result<()> {
    let mut copy = Copy {
        dst: address,
        src: from.get(),
        len,
        mode: 0,
        copy: 0,
    };
    // SAFETY: the request names the struct that is passed. The kernel reads a page of ours,
    // checking the address, and writes memory of the process that made `uffd` only.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Maps `len` bytes of consecutive pages that are in the memory's file already.
pub(crate) fn continue_pages(uffd: BorrowedFd<'_>, address: u64, len: u64) -> io::Result<()> {
    let mut pages = Continue {
        start: address,
        len,
        mode: 0,
        mapped: 0,
    };
    // SAFETY: the request names the struct that is passed, and changes page tables of the
    // process that made `uffd` only.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_CONTINUE, &raw mut pages) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
