//! Where faults come from and where pages go: what a session needs of a guest's memory.
//!
//! The kernel's userfaultfd is one; the model that the tests check sessions against is another.

use std::io;

use crate::address::HostAddr;
use crate::sys::uffd::{EventBuffer, Installed, SourceAddr, Uffd};

/// A guest's memory, as seen by who fills it.
pub(crate) trait FaultSource {
    /// Reads as many events as fit; an empty buffer means there were none.
    fn read_events(&self, buffer: &mut EventBuffer) -> io::Result<()>;

    /// Installs `len` bytes of ours and wakes who waits for them; with `protect`, the first
    /// write to each page will be an event.
    fn copy(&self, dst: HostAddr, src: SourceAddr, len: u64, protect: bool) -> Installed;

    /// Lets writes through and wakes who waits to write.
    fn unprotect(&self, start: HostAddr, len: u64) -> io::Result<()>;

    /// Installs zeros and wakes who waits for them.
    fn zero(&self, dst: HostAddr, len: u64) -> Installed;

    /// Makes the range fail on access.
    fn poison(&self, dst: HostAddr, len: u64) -> Installed;

    /// Wakes who waits in the range; those whose page is missing fault again.
    fn wake(&self, start: HostAddr, len: u64) -> io::Result<()>;
}

impl FaultSource for Uffd {
    fn read_events(&self, buffer: &mut EventBuffer) -> io::Result<()> {
        self.read_events(buffer)
    }

    fn copy(&self, dst: HostAddr, src: SourceAddr, len: u64, protect: bool) -> Installed {
        self.copy(dst, src, len, protect)
    }

    fn unprotect(&self, start: HostAddr, len: u64) -> io::Result<()> {
        self.unprotect(start, len)
    }

    fn zero(&self, dst: HostAddr, len: u64) -> Installed {
        self.zero(dst, len)
    }

    fn poison(&self, dst: HostAddr, len: u64) -> Installed {
        self.poison(dst, len)
    }

    fn wake(&self, start: HostAddr, len: u64) -> io::Result<()> {
        self.wake(start, len)
    }
}
