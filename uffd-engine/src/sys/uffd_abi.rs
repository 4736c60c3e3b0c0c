//! userfaultfd's structs and ioctl numbers.
//!
//! Source: `linux/userfaultfd.h` (6.18).

pub(super) const UFFD_API: u64 = 0xAA;
pub(super) const UFFDIO: u32 = 0xAA;

/// `UFFD_FEATURE_EVENT_REMOVE`: tell us when the VMM gives memory back.
pub const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// `UFFD_FEATURE_WP_ASYNC`: the kernel itself lets writes through and remembers them, for
/// `PAGEMAP_SCAN`.
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: write-protection of shared memory and huge pages, too.
pub const FEATURE_WP_SHARED: u64 = 1 << 12;
/// `UFFD_FEATURE_MISSING_HUGETLBFS`: missing faults on huge pages.
pub const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
/// `UFFD_FEATURE_MISSING_SHMEM`: missing faults on shared memory.
pub const FEATURE_MISSING_SHMEM: u64 = 1 << 5;

/// `UFFD_FEATURE_MINOR_HUGETLBFS`: faults on huge pages that are in the file and not mapped.
pub const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
/// `UFFD_FEATURE_MINOR_SHMEM`: the same on shared memory.
pub const FEATURE_MINOR_SHMEM: u64 = 1 << 10;

pub(super) const REGISTER_MODE_MISSING: u64 = 1 << 0;
pub(super) const REGISTER_MODE_WP: u64 = 1 << 1;
pub(super) const REGISTER_MODE_MINOR: u64 = 1 << 2;
pub(super) const COPY_MODE_WP: u64 = 1 << 1;
/// `_UFFDIO_WRITEPROTECT`: the bit of `uffdio_register.ioctls` that says the range can be.
pub(super) const IOCTL_WRITEPROTECT: u64 = 1 << 0x06;

pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
pub(super) const EVENT_REMOVE: u8 = 0x15;
pub(super) const EVENT_UNMAP: u8 = 0x16;

pub(super) const PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
pub(super) const PAGEFAULT_FLAG_WP: u64 = 1 << 1;
pub(super) const PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

#[repr(C)]
pub(super) struct UffdioApi {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UffdioRange {
    pub(super) start: u64,
    pub(super) len: u64,
}

#[repr(C)]
pub(super) struct UffdioRegister {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
pub(super) struct UffdioCopy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) copy: i64,
}

#[repr(C)]
pub(super) struct UffdioZeropage {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) zeropage: i64,
}

#[repr(C)]
pub(super) struct UffdioContinue {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) mapped: i64,
}

#[repr(C)]
pub(super) struct UffdioPoison {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) updated: i64,
}

#[repr(C)]
pub(super) struct UffdioWriteprotect {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
}

/// One `struct uffd_msg`, as the kernel writes it: 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct UffdMsg {
    pub(super) event: u8,
    pub(super) reserved1: u8,
    pub(super) reserved2: u16,
    pub(super) reserved3: u32,
    pub(super) arg: [u64; 3],
}

const _: () = assert!(size_of::<UffdioApi>() == 24);
const _: () = assert!(size_of::<UffdioRegister>() == 32);
const _: () = assert!(size_of::<UffdioCopy>() == 40);
const _: () = assert!(size_of::<UffdioZeropage>() == 32);
const _: () = assert!(size_of::<UffdioContinue>() == 32);
const _: () = assert!(size_of::<UffdioPoison>() == 32);
const _: () = assert!(size_of::<UffdioWriteprotect>() == 24);
const _: () = assert!(size_of::<UffdMsg>() == 32);

/// `_IOWR(0xAA, nr, size)` and friends; x86-64 and arm64 share this encoding.
const fn ioc(dir: u32, nr: u32, size: usize) -> libc::c_ulong {
    ((dir << 30) | ((size as u32) << 16) | (UFFDIO << 8) | nr) as libc::c_ulong
}
pub(super) const IOWR: u32 = 3;
pub(super) const IOR: u32 = 2;

pub(super) const UFFDIO_API: libc::c_ulong = ioc(IOWR, 0x3F, size_of::<UffdioApi>());
pub(super) const UFFDIO_REGISTER: libc::c_ulong = ioc(IOWR, 0x00, size_of::<UffdioRegister>());
pub(super) const UFFDIO_WAKE: libc::c_ulong = ioc(IOR, 0x02, size_of::<UffdioRange>());
pub(super) const UFFDIO_COPY: libc::c_ulong = ioc(IOWR, 0x03, size_of::<UffdioCopy>());
pub(super) const UFFDIO_ZEROPAGE: libc::c_ulong = ioc(IOWR, 0x04, size_of::<UffdioZeropage>());
pub(super) const UFFDIO_WRITEPROTECT: libc::c_ulong =
    ioc(IOWR, 0x06, size_of::<UffdioWriteprotect>());
pub(super) const UFFDIO_CONTINUE: libc::c_ulong = ioc(IOWR, 0x07, size_of::<UffdioContinue>());
pub(super) const UFFDIO_POISON: libc::c_ulong = ioc(IOWR, 0x08, size_of::<UffdioPoison>());
/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`: `_IO(0xAA, 0)`.
pub(super) const USERFAULTFD_IOC_NEW: libc::c_ulong = ioc(0, 0x00, 0);
