//! Whether a directory is on a file system that other machines change too.
//!
//! The kernel tells of no change that was made elsewhere, so a watch there would miss most.

use std::os::fd::AsFd;

use rustix::fs::fstatfs;
use rustix::io::Errno;

/// Magic numbers. Source: Linux `include/uapi/linux/magic.h`, `fs/smb/client`, `fs/fuse`.
const NETWORK: [u64; 10] = [
    0x6969,      // NFS
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB 2
    0x517b,      // SMB
    0x6573_5546, // FUSE
    0x0102_1997, // 9P
    0x00c3_6400, // Ceph
    0x5346_414f, // AFS of OpenAFS
    0x6b41_4653, // AFS of the kernel
    0x7375_7245, // Coda
];

/// Whether it is one of those.
pub(super) fn is_network(directory: impl AsFd) -> Result<bool, Errno> {
    let kind = fstatfs(directory)?.f_type;
    // 32 bits, sign-extended on some architectures.
    Ok(NETWORK.contains(&(kind.cast_unsigned() & 0xffff_ffff)))
}
