//! The interposed `mmap`.
#![expect(
    unsafe_code,
    reason = "exports a C symbol and makes the system call behind it"
)]

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use uffd_engine::address::HostAddr;
use uffd_engine::region::ClaimedRegion;
use uffd_engine::sys::guest_memory::page_bytes_of;
use uffd_engine::sys::mapping::CACHE_PAGE;
use uffd_engine::sys::uffd::{
    FEATURE_EVENT_REMOVE, FEATURE_MISSING_HUGETLBFS, FEATURE_MISSING_SHMEM, FEATURE_WP_ASYNC,
    FEATURE_WP_SHARED, Uffd,
};
use uffd_engine::vmm_side;

static HANDED_OVER: AtomicBool = AtomicBool::new(false);

/// `mmap(2)`, with the guest's RAM file noticed.
///
/// # Safety
/// As `mmap(2)`.
// SAFETY: the signature is libc's; the program's own calls resolve here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    addr: *mut c_void,
    len: usize,
    prot: i32,
    flags: i32,
    fd: i32,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the caller's arguments, passed on as they are.
    let result = unsafe { libc::syscall(libc::SYS_mmap, addr, len, prot, flags, fd, offset) };
    if result == -1 {
        return libc::MAP_FAILED;
    }
    let mapped = result as *mut c_void;
    if fd < 0 || flags & libc::MAP_SHARED == 0 || !is_guest_ram(fd) {
        return mapped;
    }
    if HANDED_OVER.swap(true, Ordering::AcqRel) {
        return mapped;
    }
    match hand_over(fd, mapped as u64, len as u64, offset as u64) {
        Ok(()) => mapped,
        Err(error) => {
            eprintln!("thaw: handing guest memory over failed: {error}");
            // SAFETY: the mapping was made above and nobody has seen it.
            unsafe {
                libc::munmap(mapped, len);
                *libc::__errno_location() = libc::EIO;
            }
            libc::MAP_FAILED
        }
    }
}

/// The same function under the name that large-file programs link against.
///
/// # Safety
/// As `mmap(2)`.
// SAFETY: as for `mmap`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    addr: *mut c_void,
    len: usize,
    prot: i32,
    flags: i32,
    fd: i32,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the caller's arguments, passed on as they are.
    unsafe { mmap(addr, len, prot, flags, fd, offset) }
}

fn is_guest_ram(fd: i32) -> bool {
    let Some(expected) = std::env::var_os("THAW_RAM_INODE") else {
        return false;
    };
    // SAFETY: `stat` is plain data; the kernel fills it or the call fails.
    let stat = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::fstat(fd, &raw mut stat) != 0 {
            return false;
        }
        stat
    };
    expected.to_str() == Some(&format!("{}:{}", stat.st_dev, stat.st_ino))
}

fn hand_over(ram: i32, base: u64, size: u64, offset: u64) -> io::Result<()> {
    let socket = std::env::var_os("THAW_UFFD_SOCKET")
        .map(PathBuf::from)
        .ok_or_else(|| io::Error::other("THAW_UFFD_SOCKET is not set"))?;
    // SAFETY: the program's, which it has just mapped and keeps open meanwhile.
    let page_size = page_bytes_of(unsafe { BorrowedFd::borrow_raw(ram) })?;
    let missing = if page_size == CACHE_PAGE {
        FEATURE_MISSING_SHMEM
    } else {
        FEATURE_MISSING_HUGETLBFS
    };
    let needed = FEATURE_EVENT_REMOVE | missing;
    // With the second the kernel can remember what the guest writes (Linux 6.7).
    let uffd = Uffd::create(needed | FEATURE_WP_SHARED | FEATURE_WP_ASYNC)
        .or_else(|_| Uffd::create(needed))?;
    uffd.register_missing(HostAddr::new(base), size)?;
    let region = ClaimedRegion {
        base,
        size,
        offset,
        page_size,
    };
    let connection = vmm_side::hand_off(&socket, &uffd, &[region])?;
    // Both live as long as the guest: a userfaultfd that nobody holds any more would
    // let the guest read zeros instead of its memory.
    std::mem::forget(connection);
    std::mem::forget(uffd);
    Ok(())
}
