//! The other source of faults: a Cloud Hypervisor that is restored with
//! `memory_mode=postcopy` asks for pages over its migration socket.
//!
//! ```text
//!   VMM                                       here
//!    │ PageFault {gpa, length} ─────────────▶  │ same session, same page states
//!    │        (its memfd, which we hold, too)  │ pages are written into the memfd
//!    │ ◀──────────────────────────────── Ok    │ it maps them with UFFDIO_CONTINUE
//! ```
//!
//! Guest addresses take the place of host addresses; a request is answered when all of its
//! pages are in the memfd, in the order of the requests. Nobody gives memory back here: the VMM
//! punches holes itself, and asks again for what it misses.
//!
//! [`serve`] has a thread to itself, so that it may wait for the disk: it stalls nobody else.
//!
//! Source: Cloud Hypervisor `vm-migration/src/protocol.rs` (main, July 2026).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use snapshot_format::PageIndex;

use crate::address::HostAddr;
use crate::counters::SessionStats;
use crate::fault_source::FaultSource;
use crate::page_state::PageStates;
use crate::region::RegionTable;
use crate::session::{ReadRequest, Reads, Session, SessionParts};
use crate::source::{Location, PageSource};
use crate::sys::mapping::{HUGE_PAGE, zeros};
use crate::sys::memfd_copy::write_from;
use crate::sys::uffd::{Event, EventBuffer, FaultKind, InstallError, Installed, SourceAddr};
use crate::tracking::Tracking;

const PAGE_FAULT: u16 = 9;
const STATUS_OK: u16 = 1;
const STATUS_ERROR: u16 = 2;
/// Header of a request and of a response; a `PageFault` has a range of the same size behind it.
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = 2 * HEADER_BYTES;
/// Pages of one request: more is not a fault.
const MAX_REQUEST_PAGES: u64 = 512;

/// Serves one VMM until it closes its socket; returns what was done.
///
/// `regions` have guest addresses for host addresses and their place in `memory` for their place
/// in the snapshot: a VMM's one memfd, laid out as the snapshot is.
///
/// # Errors
/// The socket fails, the VMM sends what is no page request, or a page can't be had.
pub fn serve(
    connection: OwnedFd,
    memory: File,
    regions: RegionTable,
    states: PageStates,
    source: Arc<PageSource>,
) -> io::Result<SessionStats> {
    let pidfd = connection.try_clone()?;
    let page_bytes = regions.page_bytes();
    let filled = (0..states.pages().get()).map(|page| {
        let state = states.get(PageIndex::new(page));
        state.is_installed()
    });
    let guest = Postcopy {
        connection,
        memory,
        regions: regions.clone(),
        page_bytes,
        state: RefCell::new(Pending {
            filled: filled.collect(),
            requests: VecDeque::new(),
            partial: Vec::new(),
            closed: false,
        }),
    };
    let parts = SessionParts {
        uffd: guest,
        pidfd,
        handoff: None,
        regions,
        states,
        source,
        tracking: Tracking::Off,
    };
    let mut session = Session::new(parts, 16);
    let mut events = EventBuffer::default();
    loop {
        session.turn(&mut events, &mut Blocking);
        if let Some(reason) = session.take_failure() {
            return Err(io::Error::other(reason));
        }
        let guest = session.uffd();
        guest.answer_ready()?;
        if guest.state.borrow().closed {
            return Ok(session.stats());
        }
        if events.is_empty() {
            wait_readable(&guest.connection)?;
        }
    }
}

fn wait_readable(fd: &OwnedFd) -> io::Result<()> {
    loop {
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Everything is copied from the mapping, from the disk if need be.
struct Blocking;

impl Reads for Blocking {
    fn resident(&mut self, _: &PageSource, _: Location, len: u64, _: Instant) -> u64 {
        len
    }

    fn longest_read(&self, page_bytes: u64) -> u64 {
        page_bytes
    }

    fn start(&mut self, _: &PageSource, _: ReadRequest) -> bool {
        false
    }
}

struct Postcopy {
    connection: OwnedFd,
    memory: File,
    regions: RegionTable,
    page_bytes: u64,
    state: RefCell<Pending>,
}

struct Pending {
    /// Which pages are in the memfd.
    filled: Vec<bool>,
    /// Pages of requests without an answer, oldest first.
    requests: VecDeque<std::ops::Range<u64>>,
    /// The beginning of a request.
    partial: Vec<u8>,
    closed: bool,
}

impl Postcopy {
    /// Answers the oldest requests as far as all of their pages are there.
    fn answer_ready(&self) -> io::Result<()> {
        let state = &mut *self.state.borrow_mut();
        while let Some(request) = state.requests.front()
            && request.clone().all(|page| state.filled[page as usize])
        {
            state.requests.pop_front();
            self.respond(STATUS_OK)?;
        }
        Ok(())
    }

    fn respond(&self, status: u16) -> io::Result<()> {
        let mut response = [0u8; HEADER_BYTES];
        response[..2].copy_from_slice(&status.to_le_bytes());
        crate::sys::fdpass::send(self.connection.as_fd(), &response, &[])
    }

    /// The pages of a request, checked.
    fn pages_of(&self, request: &[u8; REQUEST_BYTES]) -> io::Result<std::ops::Range<u64>> {
        let word = |at: usize| {
            let bytes = request[at..at + 8].try_into().expect("eight bytes");
            u64::from_le_bytes(bytes)
        };
        let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
        let command = u16::from_le_bytes([request[0], request[1]]);
        if command != PAGE_FAULT || word(8) != HEADER_BYTES as u64 {
            let length = word(8);
            return Err(invalid(format!(
                "command {command} with {length} bytes is no page request"
            )));
        }
        let (gpa, length) = (word(16), word(24));
        let first = self.regions.page_at(HostAddr::new(gpa));
        let pages = length.div_ceil(self.page_bytes);
        let fits = |first: PageIndex| pages <= self.regions.addr_of(first).1.get();
        match first {
            Some(first) if (1..=MAX_REQUEST_PAGES).contains(&pages) && fits(first) => {
                Ok(first.get()..first.get() + pages)
            }
            _ => Err(invalid(format!(
                "{length} bytes at guest address {gpa:#x} are not the guest's"
            ))),
        }
    }

    /// Fills pages that aren't yet, as the kernel does: up to the first that is.
    fn fill(
        &self,
        dst: HostAddr,
        len: u64,
        put: impl Fn(u64, u64) -> io::Result<u64>,
    ) -> Installed {
        let stopped = |bytes, error| Installed {
            bytes,
            stopped: Some(error),
        };
        let Some(first) = self.regions.page_at(dst) else {
            return stopped(0, InstallError::NotMapped);
        };
        let first = first.get();
        let state = &mut *self.state.borrow_mut();
        let wanted = &state.filled[first as usize..][..(len / self.page_bytes) as usize];
        let free = wanted.iter().take_while(|filled| !**filled).count() as u64;
        if free == 0 {
            return stopped(0, InstallError::AlreadyPresent);
        }
        match put(first * self.page_bytes, free * self.page_bytes) {
            Ok(bytes) => {
                let pages = bytes / self.page_bytes;
                state.filled[first as usize..][..pages as usize].fill(true);
                let done = pages * self.page_bytes;
                Installed {
                    bytes: done,
                    stopped: (done < len).then_some(InstallError::Retry),
                }
            }
            Err(error) => stopped(
                0,
                match error.raw_os_error() {
                    Some(libc::EFAULT) => InstallError::SourceUnreadable,
                    errno => InstallError::Errno(errno.unwrap_or(libc::EIO)),
                },
            ),
        }
    }
}

impl FaultSource for Postcopy {
    fn read_events(&self, buffer: &mut EventBuffer) -> io::Result<()> {
        buffer.clear();
        let state = &mut *self.state.borrow_mut();
        let mut bytes = [0u8; REQUEST_BYTES];
        let room = REQUEST_BYTES - state.partial.len();
        match nix::sys::socket::recv(
            std::os::fd::AsRawFd::as_raw_fd(&self.connection),
            &mut bytes[..room],
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        ) {
            Ok(0) | Err(nix::Error::ECONNRESET) => state.closed = true,
            Ok(read) => state.partial.extend_from_slice(&bytes[..read]),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if let Ok(request) = <&[u8; REQUEST_BYTES]>::try_from(&state.partial[..]) {
            state.requests.push_back(self.pages_of(request)?);
            state.partial.clear();
        }
        // As many as fit; what is left of a long request comes with the next read.
        let pages = state.requests.iter().flat_map(Clone::clone);
        for page in pages.filter(|page| !state.filled[*page as usize]) {
            let (addr, _) = self.regions.addr_of(PageIndex::new(page));
            let kind = FaultKind::Read;
            if !buffer.push(Event::Fault { addr, kind }) {
                break;
            }
        }
        Ok(())
    }

    fn copy(&self, dst: HostAddr, src: SourceAddr, len: u64, _protect: bool) -> Installed {
        self.fill(dst, len, |at, len| write_from(&self.memory, at, src, len))
    }

    fn unprotect(&self, _: HostAddr, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, dst: HostAddr, len: u64) -> Installed {
        // A hole would not do, nor a page that is only allocated: what the VMM maps afterwards
        // has to be there.
        self.fill(dst, len, |at, len| {
            write_from(&self.memory, at, zeros(), len.min(HUGE_PAGE))
        })
    }

    fn poison(&self, _: HostAddr, len: u64) -> Installed {
        // The VMM fails its guest; there is nothing else to be told.
        let told = self.respond(STATUS_ERROR);
        Installed {
            bytes: if told.is_ok() { len } else { 0 },
            stopped: told.is_err().then_some(InstallError::GuestGone),
        }
    }

    fn wake(&self, _: HostAddr, _: u64) -> io::Result<()> {
        self.answer_ready()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::ClaimedRegion;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use snapshot_format::PageCount;
    use std::io::{Read, Write};
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 64;
    /// Where the second region of the guest begins: after a hole, as PCI's.
    const HIGH: u64 = 1 << 32;

    fn word(page: u64) -> u64 {
        if page % 4 == 3 { 0 } else { 0xC10D + page }
    }

    struct Vmm {
        socket: UnixStream,
        memory: File,
        server: std::thread::JoinHandle<io::Result<SessionStats>>,
    }

    impl Vmm {
        fn start() -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(PAGES * PAGE).unwrap();
            for page in (0..PAGES).filter(|page| word(*page) != 0) {
                let bytes = word(page).to_le_bytes().repeat(512);
                file.as_file().write_all_at(&bytes, page * PAGE).unwrap();
            }
            let source = PageSource::open_plain(file.path()).unwrap();
            let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
            memory.set_len(PAGES * PAGE).unwrap();
            let region = |base, first: u64, pages: u64| ClaimedRegion {
                base,
                size: pages * PAGE,
                offset: first * PAGE,
                page_size: PAGE,
            };
            let claims = [region(0, 0, 40), region(HIGH, 40, 24)];
            let pages = PageCount::new(PAGES);
            let regions = RegionTable::new(&claims, PAGE, pages).unwrap();
            let states = PageStates::create(pages).unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            let their_memory = memory.try_clone().unwrap();
            let server = std::thread::spawn(move || {
                let _file = file;
                serve(theirs.into(), their_memory, regions, states, source)
            });
            Self {
                socket: ours,
                memory,
                server,
            }
        }

        fn request(&mut self, command: u16, gpa: u64, length: u64) {
            let mut request = vec![0u8; 8];
            request[..2].copy_from_slice(&command.to_le_bytes());
            for word in [16, gpa, length] {
                request.extend_from_slice(&word.to_le_bytes());
            }
            // In two parts: a stream may split it anywhere.
            self.socket.write_all(&request[..5]).unwrap();
            self.socket.write_all(&request[5..]).unwrap();
        }

        fn response(&mut self) -> u16 {
            let mut response = [0; HEADER_BYTES];
            self.socket.read_exact(&mut response).unwrap();
            u16::from_le_bytes([response[0], response[1]])
        }

        fn check(&self, page: u64) {
            // It must be there, not just read as zero.
            let at = (page * PAGE) as i64;
            let data = nix::unistd::lseek64(&self.memory, at, nix::unistd::Whence::SeekData);
            assert_eq!(data, Ok(at), "page {page} is a hole");
            let mut bytes = vec![1; PAGE as usize];
            self.memory.read_exact_at(&mut bytes, page * PAGE).unwrap();
            assert_eq!(bytes, word(page).to_le_bytes().repeat(512), "page {page}");
        }
    }

    #[test]
    fn every_page_that_is_asked_for_is_in_the_memfd_when_the_answer_comes() {
        let mut vmm = Vmm::start();
        for page in (0..PAGES).rev().filter(|page| page % 3 == 0) {
            let gpa = if page < 40 {
                page * PAGE
            } else {
                HIGH + (page - 40) * PAGE
            };
            vmm.request(PAGE_FAULT, gpa, PAGE);
            assert_eq!(vmm.response(), STATUS_OK);
            vmm.check(page);
        }
        // Several at once, some of them there already; and the same again.
        for _ in 0..2 {
            vmm.request(PAGE_FAULT, 0, 40 * PAGE);
            assert_eq!(vmm.response(), STATUS_OK);
            (0..40).for_each(|page| vmm.check(page));
        }
        drop(vmm.socket);
        let stats = vmm.server.join().unwrap().unwrap();
        assert!(stats.pages_installed >= 40, "{stats:?}");
    }

    #[test]
    fn requests_that_wait_are_all_answered_in_their_order() {
        let mut vmm = Vmm::start();
        for page in 0..40 {
            vmm.request(PAGE_FAULT, page * PAGE, PAGE);
        }
        for page in 0..40 {
            assert_eq!(vmm.response(), STATUS_OK);
            vmm.check(page);
        }
    }

    #[test]
    fn what_the_guest_wrote_meanwhile_is_not_overwritten() {
        let mut vmm = Vmm::start();
        vmm.request(PAGE_FAULT, 8 * PAGE, PAGE);
        assert_eq!(vmm.response(), STATUS_OK);
        vmm.memory.write_all_at(b"mine", 8 * PAGE).unwrap();
        vmm.request(PAGE_FAULT, 8 * PAGE, PAGE);
        assert_eq!(vmm.response(), STATUS_OK);
        let mut bytes = [0; 4];
        vmm.memory.read_exact_at(&mut bytes, 8 * PAGE).unwrap();
        assert_eq!(&bytes, b"mine");
    }

    #[test]
    fn what_is_no_request_ends_the_session_with_a_reason() {
        for (command, gpa, length) in [
            (3, 0, PAGE),
            (PAGE_FAULT, 40 * PAGE, PAGE),
            (PAGE_FAULT, 39 * PAGE, 2 * PAGE),
            (PAGE_FAULT, 0, 0),
            (PAGE_FAULT, 0, u64::MAX),
        ] {
            let mut vmm = Vmm::start();
            vmm.request(command, gpa, length);
            let error = vmm.server.join().unwrap().unwrap_err();
            assert!(!error.to_string().is_empty());
        }
    }
}
