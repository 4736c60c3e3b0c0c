//! Where faults come from and where pages go: what a session needs of a guest's memory.
//!
//! ```text
//!   Firecracker, QEMU     userfaultfd ──events──▶  session  ──UFFDIO_COPY──▶ their memory
//!   Cloud Hypervisor      socket ──page requests──▶ session ──pwrite──▶ memfd, then an answer
//! ```
//!
//! [`Guest`] is either. A third is the model of the kernel that the tests check sessions against.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use crate::address::HostAddr;
use crate::postcopy::Postcopy;
use crate::sys::uffd::{EventBuffer, Installed, SourceAddr, Uffd};

/// A guest's memory, as seen by who fills it.
pub(crate) trait FaultSource {
    /// Reads as many events as fit; an empty buffer means there were none.
    fn read_events(&self, buffer: &mut EventBuffer) -> io::Result<()>;

    /// Installs `len` bytes of ours and wakes who waits for them; with `protect`, the first
    /// write to each page will be an event.
    fn copy(&self, dst: HostAddr, src: SourceAddr, len: u64, protect: bool) -> Installed;

    /// Has the first write to each page reported from now on, if it is installed for that.
    fn watch_writes(&self, start: HostAddr, len: u64) -> io::Result<()>;

    /// Lets writes through and wakes who waits to write.
    fn unprotect(&self, start: HostAddr, len: u64) -> io::Result<()>;

    /// Installs zeros and wakes who waits for them.
    fn zero(&self, dst: HostAddr, len: u64) -> Installed;

    /// Whether [`Self::zero`] will do for pages of any size.
    fn zeroes_all_sizes(&self) -> bool {
        false
    }

    /// Makes the range fail on access.
    fn poison(&self, dst: HostAddr, len: u64) -> Installed;

    /// Wakes who waits in the range; those whose page is missing fault again.
    fn wake(&self, start: HostAddr, len: u64) -> io::Result<()>;

    /// Tells the VMM what is done by now, where waking alone doesn't.
    fn settle(&self) -> io::Result<Settled> {
        Ok(Settled::Quiet)
    }

    /// When to settle again, without an event.
    fn due(&self) -> Option<Instant> {
        None
    }
}

/// What is left after a step of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// Whatever comes next is announced by the descriptor.
    Quiet,
    /// There are events that no descriptor will announce.
    MoreEvents,
    /// The VMM will ask for nothing any more.
    Over,
}

impl FaultSource for Uffd {
    fn read_events(&self, buffer: &mut EventBuffer) -> io::Result<()> {
        self.read_events(buffer)
    }

    fn copy(&self, dst: HostAddr, src: SourceAddr, len: u64, protect: bool) -> Installed {
        self.copy(dst, src, len, protect)
    }

    fn watch_writes(&self, start: HostAddr, len: u64) -> io::Result<()> {
        self.register_missing_and_writes(start, len)
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

/// The memory of a real guest.
#[derive(Debug)]
pub(crate) enum Guest {
    /// Its VMM handed a userfaultfd over.
    Userfaultfd(Uffd),
    /// Its VMM asks for pages.
    Postcopy(Box<Postcopy>),
}

impl Guest {
    /// A duplicate of the userfaultfd, for whoever starts a successor.
    pub(crate) fn userfaultfd(&self) -> Option<&Uffd> {
        match self {
            Self::Userfaultfd(uffd) => Some(uffd),
            Self::Postcopy(_) => None,
        }
    }
}

impl AsFd for Guest {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Userfaultfd(uffd) => uffd.as_fd(),
            Self::Postcopy(postcopy) => postcopy.as_fd(),
        }
    }
}

impl FaultSource for Guest {
    fn read_events(&self, buffer: &mut EventBuffer) -> io::Result<()> {
        match self {
            Self::Userfaultfd(uffd) => uffd.read_events(buffer),
            Self::Postcopy(postcopy) => postcopy.read_events(buffer),
        }
    }

    fn copy(&self, dst: HostAddr, src: SourceAddr, len: u64, protect: bool) -> Installed {
        match self {
            Self::Userfaultfd(uffd) => uffd.copy(dst, src, len, protect),
            Self::Postcopy(postcopy) => postcopy.copy(dst, src, len, protect),
        }
    }

    fn watch_writes(&self, start: HostAddr, len: u64) -> io::Result<()> {
        match self {
            Self::Userfaultfd(uffd) => uffd.watch_writes(start, len),
            Self::Postcopy(postcopy) => postcopy.watch_writes(start, len),
        }
    }

    fn unprotect(&self, start: HostAddr, len: u64) -> io::Result<()> {
        match self {
            Self::Userfaultfd(uffd) => uffd.unprotect(start, len),
            Self::Postcopy(postcopy) => postcopy.unprotect(start, len),
        }
    }

    fn zero(&self, dst: HostAddr, len: u64) -> Installed {
        match self {
            Self::Userfaultfd(uffd) => uffd.zero(dst, len),
            Self::Postcopy(postcopy) => postcopy.zero(dst, len),
        }
    }

    fn zeroes_all_sizes(&self) -> bool {
        match self {
            Self::Userfaultfd(uffd) => uffd.zeroes_all_sizes(),
            Self::Postcopy(postcopy) => postcopy.zeroes_all_sizes(),
        }
    }

    fn poison(&self, dst: HostAddr, len: u64) -> Installed {
        match self {
            Self::Userfaultfd(uffd) => uffd.poison(dst, len),
            Self::Postcopy(postcopy) => postcopy.poison(dst, len),
        }
    }

    fn wake(&self, start: HostAddr, len: u64) -> io::Result<()> {
        match self {
            Self::Userfaultfd(uffd) => uffd.wake(start, len),
            Self::Postcopy(postcopy) => postcopy.wake(start, len),
        }
    }

    fn settle(&self) -> io::Result<Settled> {
        match self {
            Self::Userfaultfd(_) => Ok(Settled::Quiet),
            Self::Postcopy(postcopy) => postcopy.settle(),
        }
    }

    fn due(&self) -> Option<Instant> {
        match self {
            Self::Userfaultfd(_) => None,
            Self::Postcopy(postcopy) => postcopy.due(),
        }
    }
}
