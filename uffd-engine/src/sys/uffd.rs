//! userfaultfd: opening, registering, reading events, installing pages.
//!
//! The `userfaultfd` crate (0.9) loses the errno of a refused copy and knows
//! neither POISON nor the write-protect copy mode, and it wants libclang at build
//! time; the interface is small, so it is spelled out here.
//!
//! Which calls are dangerous: [`Uffd::copy`] reads *our* memory at an address the
//! caller names. The kernel checks that address and answers `EFAULT`, it never
//! raises a signal here; so a source mapping whose file was truncated behind our
//! back is an error value, not a crash. The destination is another process's
//! memory and can't hurt this one.
//!
//! Source: `linux/userfaultfd.h` (6.18), `ioctl_userfaultfd(2)`.
#![expect(unsafe_code, reason = "userfaultfd ioctls have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::uffd_abi::*;
pub use super::uffd_abi::{
    FEATURE_EVENT_REMOVE, FEATURE_MINOR_HUGETLBFS, FEATURE_MINOR_SHMEM, FEATURE_MISSING_HUGETLBFS,
    FEATURE_MISSING_SHMEM, FEATURE_WP_ASYNC, FEATURE_WP_SHARED,
};
use crate::address::HostAddr;

/// One event of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for the page at this address.
    Fault {
        /// Any byte of the page, as faulted on.
        addr: HostAddr,
        /// What the thread was doing.
        kind: FaultKind,
    },
    /// The VMM gave this range back (`MADV_DONTNEED`, `MADV_REMOVE`): it reads as zero now.
    Remove {
        /// First byte.
        start: HostAddr,
        /// One past the last byte.
        end: HostAddr,
    },
    /// The VMM unmapped this range.
    Unmap {
        /// First byte.
        start: HostAddr,
        /// One past the last byte.
        end: HostAddr,
    },
    /// Something we did not ask for (fork, remap, a newer kernel's event).
    Unknown(u8),
}

/// Why a thread faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// No page there, read access.
    Read,
    /// No page there, write access.
    Write,
    /// A write to a write-protected page.
    WriteProtect,
    /// The page exists in the file but isn't mapped.
    Minor,
}

/// Why pages could not be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstallError {
    /// `EEXIST`: the page is there already. Its waiters still have to be woken.
    AlreadyPresent,
    /// `EAGAIN`: the guest's memory map is changing; read events, try again later.
    Retry,
    /// `ESRCH`: the VMM is gone.
    GuestGone,
    /// `ENOENT`: the range is no longer registered.
    NotMapped,
    /// `EFAULT`: our own source could not be read.
    SourceUnreadable,
    /// `ENOMEM`: the host has no page to give.
    OutOfMemory,
    /// Anything else: a bug or a kernel we don't know.
    Errno(i32),
}

/// What an install did before it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Bytes installed from the start of the range.
    pub bytes: u64,
    /// Why it stopped there, if it is short of the range.
    pub stopped: Option<InstallError>,
}

/// How many events one `read` fetches at most.
pub const EVENTS_PER_READ: usize = 64;

/// Room for one `read` of events; lives as long as its worker.
pub struct EventBuffer {
    raw: Box<[UffdMsg; EVENTS_PER_READ]>,
    len: usize,
}

impl Default for EventBuffer {
    fn default() -> Self {
        Self {
            raw: Box::new([UffdMsg::default(); EVENTS_PER_READ]),
            len: 0,
        }
    }
}

impl EventBuffer {
    /// The events of the last read, in the kernel's order.
    pub fn iter(&self) -> impl Iterator<Item = Event> + '_ {
        self.raw[..self.len].iter().map(decode)
    }

    /// Puts an event into the buffer as if it had been read; `false` when it is full.
    pub(crate) fn push(&mut self, event: Event) -> bool {
        let Some(slot) = self.raw.get_mut(self.len) else {
            return false;
        };
        *slot = encode(event);
        self.len += 1;
        true
    }

    /// Forgets what was read.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// How many events the last read returned.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the last read returned nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether more may be waiting than the last read could hold.
    #[must_use]
    pub fn was_full(&self) -> bool {
        self.len == EVENTS_PER_READ
    }
}

fn decode(msg: &UffdMsg) -> Event {
    match msg.event {
        EVENT_PAGEFAULT => {
            let flags = msg.arg[0];
            let kind = if flags & PAGEFAULT_FLAG_WP != 0 {
                FaultKind::WriteProtect
            } else if flags & PAGEFAULT_FLAG_MINOR != 0 {
                FaultKind::Minor
            } else if flags & PAGEFAULT_FLAG_WRITE != 0 {
                FaultKind::Write
            } else {
                FaultKind::Read
            };
            Event::Fault {
                addr: HostAddr::new(msg.arg[1]),
                kind,
            }
        }
        EVENT_REMOVE => Event::Remove {
            start: HostAddr::new(msg.arg[0]),
            end: HostAddr::new(msg.arg[1]),
        },
        EVENT_UNMAP => Event::Unmap {
            start: HostAddr::new(msg.arg[0]),
            end: HostAddr::new(msg.arg[1]),
        },
        other => Event::Unknown(other),
    }
}

/// The opposite of [`decode`].
fn encode(event: Event) -> UffdMsg {
    let (event, arg) = match event {
        Event::Fault { addr, kind } => {
            let flags = match kind {
                FaultKind::Read => 0,
                FaultKind::Write => PAGEFAULT_FLAG_WRITE,
                FaultKind::WriteProtect => PAGEFAULT_FLAG_WP | PAGEFAULT_FLAG_WRITE,
                FaultKind::Minor => PAGEFAULT_FLAG_MINOR,
            };
            (EVENT_PAGEFAULT, [flags, addr.get(), 0])
        }
        Event::Remove { start, end } => (EVENT_REMOVE, [start.get(), end.get(), 0]),
        Event::Unmap { start, end } => (EVENT_UNMAP, [start.get(), end.get(), 0]),
        Event::Unknown(event) => (event, [0; 3]),
    };
    UffdMsg {
        event,
        arg,
        ..UffdMsg::default()
    }
}

/// A userfaultfd, ours or one that a VMM handed over.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Opens a non-blocking userfaultfd that also sees faults taken inside the
    /// kernel (a VMM's `read` into guest memory, KVM), and negotiates `features`.
    ///
    /// # Errors
    /// Neither `/dev/userfaultfd` nor the system call may be used, or the kernel
    /// lacks a feature.
    pub fn create(features: u64) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let raw = match File::open("/dev/userfaultfd") {
            // SAFETY: the ioctl takes its flags by value, no pointers.
            Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
            // SAFETY: the system call takes its flags by value, no pointers.
            Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as RawFd },
        };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just returned by the kernel and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let uffd = Self { fd };
        let mut api = UffdioApi {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        uffd.ioctl(UFFDIO_API, &mut api)?;
        Ok(uffd)
    }

    /// Takes over a descriptor that came with a hand-off, after checking that it is
    /// a non-blocking userfaultfd: anything else would be polled for ever.
    ///
    /// # Errors
    /// `InvalidInput` with what it is instead.
    pub fn from_handed_over(fd: OwnedFd) -> io::Result<Self> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the descriptor is {}, not a userfaultfd", link.display()),
            ));
        }
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFL)?;
        if flags & libc::O_NONBLOCK == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the userfaultfd is blocking; open it with O_NONBLOCK",
            ));
        }
        Ok(Self { fd })
    }

    /// Another descriptor for the same userfaultfd.
    ///
    /// # Errors
    /// The descriptor table is full.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// Registers a range of *this process's* memory for missing faults.
    ///
    /// # Errors
    /// As `UFFDIO_REGISTER`: unaligned, not mapped, or of a kind userfaultfd can't serve.
    pub fn register_missing(&self, start: HostAddr, len: u64) -> io::Result<()> {
        self.register(start, len, REGISTER_MODE_MISSING).map(|_| ())
    }

    /// The same for what is missing and for what is in the memory's file and not mapped: nothing is
    /// seen before [`Self::map_present`]. For whoever plays a VMM that asks for pages.
    ///
    /// # Errors
    /// As `UFFDIO_REGISTER`.
    pub fn register_missing_and_minor(&self, start: HostAddr, len: u64) -> io::Result<()> {
        self.register(start, len, REGISTER_MODE_MISSING | REGISTER_MODE_MINOR)
            .map(|_| ())
    }

    /// Says what can be done to the range afterwards.
    fn register(&self, start: HostAddr, len: u64, mode: u64) -> io::Result<u64> {
        let mut register = UffdioRegister {
            range: UffdioRange {
                start: start.get(),
                len,
            },
            mode,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut register)?;
        Ok(register.ioctls)
    }

    /// Maps pages that are in the memory's file and wakes who waits for them.
    ///
    /// # Errors
    /// As `UFFDIO_CONTINUE`: `EEXIST` where one is mapped already, `EFAULT` where one is not in
    /// the file.
    pub fn map_present(&self, start: HostAddr, len: u64) -> io::Result<()> {
        let mut pages = UffdioContinue {
            range: UffdioRange {
                start: start.get(),
                len,
            },
            mode: 0,
            mapped: 0,
        };
        self.ioctl(UFFDIO_CONTINUE, &mut pages)
    }

    /// Registers a range of the memory's owner again, whoever that is, so that it reports the
    /// first write to a page that was installed write-protected.
    ///
    /// # Errors
    /// As `UFFDIO_REGISTER`; `Unsupported` for memory that can't be write-protected.
    pub fn register_missing_and_writes(&self, start: HostAddr, len: u64) -> io::Result<()> {
        let mode = REGISTER_MODE_MISSING | REGISTER_MODE_WP;
        if self.register(start, len, mode)? & IOCTL_WRITEPROTECT == 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the memory can't be write-protected",
            ));
        }
        Ok(())
    }

    /// Lets writes to the range through from now on, and wakes who waits to write.
    ///
    /// # Errors
    /// As `UFFDIO_WRITEPROTECT`; `WouldBlock` while the memory map is changing.
    pub fn unprotect(&self, start: HostAddr, len: u64) -> io::Result<()> {
        let mut arg = UffdioWriteprotect {
            range: UffdioRange {
                start: start.get(),
                len,
            },
            mode: 0,
        };
        self.ioctl(UFFDIO_WRITEPROTECT, &mut arg)
    }

    /// Reads as many events as fit; an empty buffer means there were none.
    ///
    /// # Errors
    /// As `read(2)`, except `EAGAIN`, which is the empty buffer.
    pub fn read_events(&self, buffer: &mut EventBuffer) -> io::Result<()> {
        buffer.len = 0;
        // SAFETY: the buffer is exclusively ours, and `UffdMsg` is plain data of the
        // kernel's layout, valid for every bit pattern.
        let n = unsafe {
            libc::read(
                self.fd.as_raw_fd(),
                buffer.raw.as_mut_ptr().cast(),
                size_of::<UffdMsg>() * EVENTS_PER_READ,
            )
        };
        if n < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock {
                Ok(())
            } else {
                Err(error)
            };
        }
        buffer.len = n as usize / size_of::<UffdMsg>();
        Ok(())
    }

    /// Copies `len` bytes at `src` (an address of ours) to `dst` and wakes who waits there.
    /// With `protect`, the first write to each page is reported; its range must be registered
    /// for that.
    #[must_use]
    pub fn copy(&self, dst: HostAddr, src: SourceAddr, len: u64, protect: bool) -> Installed {
        let mut arg = UffdioCopy {
            dst: dst.get(),
            src: src.0,
            len,
            mode: if protect { COPY_MODE_WP } else { 0 },
            copy: 0,
        };
        let result = self.ioctl(UFFDIO_COPY, &mut arg);
        installed(result, arg.copy, len)
    }

    /// Installs zero pages over the range and wakes who waits there.
    #[must_use]
    pub fn zero(&self, dst: HostAddr, len: u64) -> Installed {
        let mut arg = UffdioZeropage {
            range: UffdioRange {
                start: dst.get(),
                len,
            },
            mode: 0,
            zeropage: 0,
        };
        let result = self.ioctl(UFFDIO_ZEROPAGE, &mut arg);
        installed(result, arg.zeropage, len)
    }

    /// Makes the range fail on access (`SIGBUS`, a machine check for a guest)
    /// instead of waiting for ever. Linux 6.6.
    #[must_use]
    pub fn poison(&self, dst: HostAddr, len: u64) -> Installed {
        let mut arg = UffdioPoison {
            range: UffdioRange {
                start: dst.get(),
                len,
            },
            mode: 0,
            updated: 0,
        };
        let result = self.ioctl(UFFDIO_POISON, &mut arg);
        installed(result, arg.updated, len)
    }

    /// Wakes every thread that waits in the range; those whose page is still
    /// missing fault again.
    ///
    /// # Errors
    /// As `UFFDIO_WAKE`.
    pub fn wake(&self, start: HostAddr, len: u64) -> io::Result<()> {
        let mut range = UffdioRange {
            start: start.get(),
            len,
        };
        self.ioctl(UFFDIO_WAKE, &mut range)
    }

    fn ioctl<T>(&self, request: libc::c_ulong, arg: &mut T) -> io::Result<()> {
        // SAFETY: every caller pairs `request` with the struct whose size is encoded
        // in it (asserted above), and `arg` is exclusively borrowed for the call.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_mut(arg)) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// An address in this process that the kernel copies from on our behalf. It is
/// never dereferenced here, so a stale one is an [`InstallError::SourceUnreadable`].
#[derive(Clone, Copy, Debug)]
pub struct SourceAddr(pub(super) u64);

impl SourceAddr {
    /// The bare number.
    #[cfg(test)]
    pub(crate) fn get(self) -> u64 {
        self.0
    }

    /// The address `bytes` further on in the same source.
    #[must_use]
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

/// The kernel reports progress in the result field: negative for an errno, else
/// bytes. A short count comes with `EAGAIN` and hides why the next page failed,
/// so a caller goes on with the rest and learns it there.
fn installed(result: io::Result<()>, field: i64, len: u64) -> Installed {
    let Err(error) = result else {
        return Installed {
            bytes: len,
            stopped: None,
        };
    };
    if field > 0 {
        return Installed {
            bytes: field as u64,
            stopped: Some(InstallError::Retry),
        };
    }
    let errno = if field < 0 {
        -field as i32
    } else {
        error.raw_os_error().unwrap_or(0)
    };
    let stopped = match errno {
        libc::EEXIST => InstallError::AlreadyPresent,
        libc::EAGAIN => InstallError::Retry,
        libc::ESRCH => InstallError::GuestGone,
        libc::ENOENT => InstallError::NotMapped,
        libc::EFAULT => InstallError::SourceUnreadable,
        libc::ENOMEM => InstallError::OutOfMemory,
        other => InstallError::Errno(other),
    };
    Installed {
        bytes: 0,
        stopped: Some(stopped),
    }
}
