//! How a process ended that is nobody's child here: the kernel says so to whoever holds its pidfd.
//!
//! Source: `linux/pidfd.h`; `PIDFD_INFO_EXIT` is there since Linux 6.15, and told once the process
//! was reaped.
#![expect(unsafe_code, reason = "an ioctl of pidfds")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// `_IOWR(0xFF, 11, struct pidfd_info)`, of its first version.
const PIDFD_GET_INFO: libc::c_ulong = 0xC040_FF0B;
const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// `pidfd_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    mask: u64,
    cgroup: u64,
    /// Process, thread group and parent; users and groups.
    ids: [u32; 11],
    exit_code: i32,
}

const _: () = assert!(size_of::<Info>() == 64);

/// Its exit status, where the kernel knows it.
#[must_use]
pub fn exit_status(pidfd: BorrowedFd<'_>) -> Option<ExitStatus> {
    let mut info = Info {
        mask: PIDFD_INFO_EXIT,
        ..Info::default()
    };
    // SAFETY: PIDFD_GET_INFO reads and writes one `pidfd_info` of the size in its number.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
    let is_known = result == 0 && info.mask & PIDFD_INFO_EXIT != 0;
    is_known.then(|| ExitStatus::from_raw(info.exit_code))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::Command;

    use uffd_engine::sys::process::pidfd_open;

    use super::*;

    #[test]
    fn status_of_a_process_that_another_has_reaped_is_known_or_not_but_never_wrong() {
        let mut child = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        let pidfd = pidfd_open(child.id() as i32).unwrap();
        child.wait().unwrap();
        let status = exit_status(pidfd.as_fd());
        println!("{status:?}");
        assert!(status.is_none_or(|status| status.code() == Some(7)));
    }
}
