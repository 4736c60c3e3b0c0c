//! Loaded into an unmodified QEMU with `LD_PRELOAD`, gives it what Firecracker has
//! built in: guest memory that an outside handler serves through userfaultfd.
//!
//! QEMU maps its RAM file (`memory-backend-file`, `share=on`) with `mmap`. This library
//! sees that one call, registers the new mapping for missing faults before QEMU can
//! touch it, and sends Firecracker's hand-off to the engine. Every other `mmap` goes
//! straight to the kernel.
//!
//! | variable | meaning |
//! |---|---|
//! | `THAW_RAM_INODE` | `device:inode` of the RAM file, as `stat` numbers in decimal |
//! | `THAW_UFFD_SOCKET` | where the engine listens for the hand-off |
//!
//! Without them the library does nothing. If the hand-off fails, it says so on standard
//! error and fails the `mmap`: a guest without its memory must not start.
//!
//! # Architecture invariant
//! No state but "already handed over", no threads, no allocation outside the one call
//! that is for us.

pub mod sys;
