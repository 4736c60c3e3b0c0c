//! Feeding the kernel's random generator, so that clones of one snapshot diverge.
//!
//! RNDADDENTROPY mixes and credits, RNDRESEEDCRNG makes the next read use it at once instead of at
//! the next periodic reseed. Source: random(4), Linux `drivers/char/random.c`.
#![expect(unsafe_code, reason = "two ioctls of /dev/urandom")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::libc;

/// Largest number of bytes taken at once.
pub(crate) const MAX_ENTROPY: usize = 512;

/// `struct rand_pool_info` with room for [`MAX_ENTROPY`] bytes.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; MAX_ENTROPY],
}

const _: () = assert!(size_of::<RandPoolInfo>() == 8 + MAX_ENTROPY);

// _IOW('R', 0x03, int[2]) and _IO('R', 0x07) in linux/random.h.
nix::ioctl_write_ptr_bad!(rnd_add_entropy, 0x4008_5203, RandPoolInfo);
nix::ioctl_none_bad!(rnd_reseed_crng, 0x5207);

/// Mixes the bytes in, credits them in full, and reseeds; bytes beyond [`MAX_ENTROPY`] are ignored.
///
/// # Errors
/// Without CAP_SYS_ADMIN, or without /dev/urandom.
pub(crate) fn add(bytes: &[u8]) -> io::Result<()> {
    let bytes = &bytes[..bytes.len().min(MAX_ENTROPY)];
    let size = libc::c_int::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut info = RandPoolInfo {
        entropy_count: size * 8,
        buf_size: size,
        buf: [0; MAX_ENTROPY],
    };
    info.buf[..bytes.len()].copy_from_slice(bytes);

    let device = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: `info` is laid out as the kernel's struct (asserted above), lives across the call, and
    // `buf_size` is at most the length of `buf`, so the kernel reads only inside it.
    unsafe { rnd_add_entropy(device.as_raw_fd(), &raw const info) }?;
    // SAFETY: the request takes no argument.
    match unsafe { rnd_reseed_crng(device.as_raw_fd()) } {
        // The generator wasn't ready before; the credit above has just seeded it.
        Ok(_) | Err(Errno::ENODATA) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
