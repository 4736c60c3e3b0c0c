//! Bringing `lo` up, as nobody else does when envd is the first process.
#![expect(unsafe_code, reason = "two network ioctls over a C struct")]

use std::io;
use std::os::fd::AsRawFd as _;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

nix::ioctl_read_bad!(get_flags, libc::SIOCGIFFLAGS, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, libc::ifreq);

/// Sets IFF_UP on `lo`; the kernel assigns 127.0.0.1 by itself.
///
/// # Errors
/// Without CAP_NET_ADMIN, or in a kernel without networking.
pub(crate) fn up() -> io::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is plain C data for which all-zero bytes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = from.cast_signed();
    }
    // SAFETY: `request` is a live ifreq with a NUL-terminated name; the kernel fills in its flags.
    unsafe { get_flags(socket.as_raw_fd(), &raw mut request) }?;
    // SAFETY: after SIOCGIFFLAGS succeeded the union holds flags, which is what is read and written.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: as for the first ioctl; the kernel only reads the struct.
    unsafe { set_flags(socket.as_raw_fd(), &raw const request) }?;
    Ok(())
}
