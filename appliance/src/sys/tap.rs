//! Tap devices: `/dev/net/tun` in the namespace of the calling thread.
#![expect(unsafe_code, reason = "ioctls of /dev/net/tun")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

// Source: linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54CA;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54CB;
const TUNSETOWNER: libc::c_ulong = 0x4004_54CC;

/// Makes a tap device that stays when nobody has it open.
///
/// # Errors
/// As the ioctls; there is no `/dev/net/tun`; the name is over 15 bytes.
pub fn create_persistent(name: &str) -> io::Result<()> {
    let device = open(name)?;
    // SAFETY: TUNSETPERSIST takes its argument by value.
    if unsafe { libc::ioctl(device.as_raw_fd(), TUNSETPERSIST, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets a user without privilege open a persistent tap device.
///
/// # Errors
/// As the ioctls; somebody has it open.
pub fn set_owner(name: &str, user: u32) -> io::Result<()> {
    let device = open(name)?;
    // SAFETY: TUNSETOWNER takes its argument by value.
    if unsafe { libc::ioctl(device.as_raw_fd(), TUNSETOWNER, libc::c_ulong::from(user)) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn open(name: &str) -> io::Result<File> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data, valid as zeros.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "link name over 15 bytes",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`.
    if unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(device)
}
