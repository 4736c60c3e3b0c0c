//! Waiting for a descriptor of a kind that tokio has no type for.
#![expect(unsafe_code, reason = "AsyncFd trusts its descriptor to stay the same")]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor that doesn't block, to be waited for until it can be read.
///
/// # Errors
/// When it is of a kind that can't be waited for.
pub(crate) fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is one open descriptor, always the same, until it is dropped; and the
    // AsyncFd, which owns it from here on, gives it up only when it ends its registration.
    let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
    Ok(registered?)
}
