//! The VMM's half of a hand-off: register memory, send it to an engine.
//!
//! For whatever plays a VMM without being one: the preload library that lends this
//! half to QEMU, tests, and the faulting client of the benches.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::handoff;
use crate::region::ClaimedRegion;
use crate::sys::fdpass;
use crate::sys::uffd::Uffd;

pub use crate::sys::guest_memory::GuestMemory;

/// Sends registered memory to the engine that listens at `socket`. Keep the returned
/// connection open for as long as the guest lives.
///
/// # Errors
/// Nobody listens there, or the message could not be sent.
pub fn hand_off(socket: &Path, uffd: &Uffd, regions: &[ClaimedRegion]) -> io::Result<UnixStream> {
    let connection = UnixStream::connect(socket)?;
    fdpass::send(
        connection.as_fd(),
        &handoff::message(regions),
        &[uffd.as_fd()],
    )?;
    Ok(connection)
}
