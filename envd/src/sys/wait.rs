//! Reaping any child. nix's `waitpid` can't represent a death by a real-time signal and would leave
//! such a child half-reaped, so the raw status goes to the standard library instead.
#![expect(unsafe_code, reason = "waitpid with a raw status")]

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use nix::errno::Errno;
use nix::libc;

/// Reaps one child that has ended, whichever it is; `None` when there is none now.
pub(crate) fn reap_any() -> Option<(i32, ExitStatus)> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a live, aligned c_int for the whole call, which writes nothing else.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        match Errno::result(pid) {
            Ok(0) => return None,
            Ok(pid) => return Some((pid, ExitStatus::from_raw(status))),
            Err(Errno::EINTR) => {}
            // ECHILD: no children at all.
            Err(_) => return None,
        }
    }
}
