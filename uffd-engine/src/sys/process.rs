//! Other processes (pidfd) and our own placement (CPU, NUMA memory policy).
#![expect(
    unsafe_code,
    reason = "pidfd and mempolicy calls have no safe wrapper here"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A descriptor that becomes readable when the process ends, and never refers to
/// another process that got the same number later.
///
/// # Errors
/// As `pidfd_open(2)`.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a non-negative result is a new descriptor that we own.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(raw as RawFd) })
}

/// Sends a signal to exactly the process behind a pidfd. `false` when it has ended
/// already.
///
/// # Errors
/// As `pidfd_send_signal(2)`, except `ESRCH`.
pub fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<bool> {
    // SAFETY: a null siginfo means the default one; no other pointers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) {
        Ok(false)
    } else {
        Err(error)
    }
}

/// A duplicate of another process's descriptor.
///
/// # Errors
/// As `pidfd_getfd(2)`: whoever may attach a debugger to the process may have it.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, descriptor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a non-negative result is a new descriptor that we own.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), descriptor, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(raw as RawFd) })
}

/// Binds all memory that this process allocates from now on to one NUMA node.
///
/// # Errors
/// As `set_mempolicy(2)`; `node` ≥ 64 is `InvalidInput`.
pub fn bind_memory_to_node(node: u32) -> io::Result<()> {
    let mask: u64 = 1u64
        .checked_shl(node)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "node number over 63"))?;
    // SAFETY: the mask is one word of 64 bits and the kernel reads maxnode - 1 bits of it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            libc::MPOL_BIND,
            &raw const mask,
            65,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes this process die with the one that spawned it.
///
/// # Errors
/// As `prctl(2)`.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: no pointers.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Page faults of the calling thread that waited for a disk, since it was started.
#[must_use]
pub fn thread_major_faults() -> u64 {
    // SAFETY: `rusage` is plain data, valid as zeros.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is exclusively borrowed for the call.
    let result = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    assert_eq!(result, 0, "a thread may always ask about itself");
    usage.ru_majflt as u64
}
