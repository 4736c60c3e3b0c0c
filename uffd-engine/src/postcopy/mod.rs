//! The other source of faults: a Cloud Hypervisor that is restored with
//! `memory_mode=postcopy` asks for pages over a connection of its migration socket.
//!
//! ```text
//!   VMM                                       here
//!    │ PageFault {gpa, length} ─────────────▶  │ same session, same page states
//!    │        (its memfd, which we hold, too)  │ pages are written into the memfd
//!    │ ◀──────────────────────────────── Ok    │ it maps them with UFFDIO_CONTINUE
//! ```
//!
//! Guest addresses take the place of host addresses; a request is answered when all of its
//! pages are in the memfd, in the order of the requests. Nobody says here that memory is given
//! back: the VMM punches holes itself, and asks again for what it misses, which is zero then.
//!
//! A request is only looked at until it is answered, and taken then: one that a dead engine had
//! seen and not answered is there for its successor. It may have died between the two, though. A
//! VMM asks for one thing at a time, so a successor that finds a request whose pages are all there
//! waits: if another follows, the first was answered; if none does, it was not. An engine that
//! surrenders has taken what it answered, and leaves no such doubt.
//!
//! Nothing here waits: a VMM that doesn't read its answers is given up.
//!
//! Source: Cloud Hypervisor `vm-migration/src/protocol.rs` (53).

mod connection;
pub mod requests;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use snapshot_format::PageIndex;

use crate::address::HostAddr;
use crate::fault_source::{FaultSource, Settled};
use crate::page_state::PageStates;
use crate::region::RegionTable;
use crate::sys::memfd_copy::GuestFile;
use crate::sys::uffd::{Event, EventBuffer, FaultKind, InstallError, Installed, SourceAddr};
use connection::{Answer, Connection, is_hang_up};
use requests::Requests;

/// How long a VMM takes at most from an answer to its next request, or to none.
const DOUBT: Duration = Duration::from_millis(300);

/// One VMM's socket and memory.
#[derive(Debug)]
pub(crate) struct Postcopy {
    connection: Connection,
    memory: GuestFile,
    regions: RegionTable,
    page_bytes: u64,
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    /// Which pages are in the memfd.
    filled: Vec<bool>,
    requests: Requests,
    /// Of a successor: until when its first request, if its pages are all there, may have been
    /// answered.
    doubt: Option<Instant>,
    /// There has been a request.
    was_asked: bool,
    /// The VMM asks for nothing any more, or was told that it can't be served.
    over: bool,
}

impl Postcopy {
    /// `regions` have guest addresses for host addresses and their place in `memory` for their
    /// place in the snapshot: a VMM's one memfd, laid out as the snapshot is.
    ///
    /// # Errors
    /// `InvalidInput` when `memory` is shorter than the regions; otherwise `connection` is no Unix
    /// socket, or `memory` can't be mapped.
    pub(crate) fn new(
        connection: OwnedFd,
        memory: File,
        regions: RegionTable,
        states: &PageStates,
    ) -> io::Result<Self> {
        let page_bytes = regions.page_bytes();
        let (found, expected) = (memory.metadata()?.len(), states.pages().get() * page_bytes);
        if found < expected {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the guest's memory file has {found} bytes, its regions {expected}"),
            ));
        }
        let connection = Connection::new(connection)?;
        let filled = (0..states.pages().get()).map(|page| {
            let state = states.get(PageIndex::new(page));
            state.is_installed()
        });
        let filled: Vec<bool> = filled.collect();
        let has_predecessor = filled.contains(&true);
        Ok(Self {
            connection,
            memory: GuestFile::new(memory, expected)?,
            page_bytes,
            state: RefCell::new(State {
                filled,
                requests: Requests::default(),
                doubt: has_predecessor.then(|| Instant::now() + DOUBT),
                was_asked: false,
                over: false,
            }),
            regions,
        })
    }

    /// Whoever served this VMM before did not die between an answer and taking its request.
    pub(crate) fn trust_predecessor(&mut self) {
        self.state.get_mut().doubt = None;
    }

    /// The guest's memory.
    pub(crate) fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// Whether a page that was filled has been given back.
    fn is_hole(&self, page: u64) -> bool {
        self.memory.is_hole(page * self.page_bytes, self.page_bytes)
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
                    Some(libc::ENOMEM | libc::ENOSPC) => InstallError::OutOfMemory,
                    errno => InstallError::Errno(errno.unwrap_or(libc::EIO)),
                },
            ),
        }
    }
}

impl AsFd for Postcopy {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl FaultSource for Postcopy {
    fn read_events(&self, buffer: &mut EventBuffer) -> io::Result<()> {
        buffer.clear();
        let state = &mut *self.state.borrow_mut();
        loop {
            // As many as fit; what is left comes with the next turn, which settling asks for.
            while !buffer.was_full() {
                let State {
                    filled, requests, ..
                } = state;
                let Some(page) = requests.next_page(|page| filled[page as usize]) else {
                    break;
                };
                let (addr, _) = self.regions.addr_of(PageIndex::new(page));
                let kind = FaultKind::Read;
                buffer.push(Event::Fault { addr, kind });
            }
            if buffer.was_full() || state.over {
                return Ok(());
            }
            match self.connection.look(state.requests.room()) {
                Ok(0) | Err(nix::Error::ECONNRESET) => state.over = true,
                Ok(bytes) => {
                    let Some(pages) = state.requests.received(bytes, &self.regions)? else {
                        continue;
                    };
                    let mut all = true;
                    for page in pages {
                        let filled = &mut state.filled[page as usize];
                        *filled = *filled && !self.is_hole(page);
                        all &= *filled;
                    }
                    if !std::mem::replace(&mut state.was_asked, true) && !all {
                        state.doubt = None;
                    }
                }
                Err(nix::Error::EAGAIN) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn copy(&self, dst: HostAddr, src: SourceAddr, len: u64, _protect: bool) -> Installed {
        self.fill(dst, len, |at, len| self.memory.write_from(at, src, len))
    }

    fn watch_writes(&self, _: HostAddr, _: u64) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "a VMM that asks for pages maps them itself",
        ))
    }

    fn unprotect(&self, _: HostAddr, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, dst: HostAddr, len: u64) -> Installed {
        self.fill(dst, len, |at, len| self.memory.zero(at, len))
    }

    fn zeroes_all_sizes(&self) -> bool {
        true
    }

    fn poison(&self, _: HostAddr, len: u64) -> Installed {
        // The VMM fails its guest; there is nothing else to be told, and nothing to be answered.
        let told = self.connection.respond(Answer::Error);
        self.state.borrow_mut().over = true;
        Installed {
            bytes: if told.is_ok() { len } else { 0 },
            stopped: told.is_err().then_some(InstallError::GuestGone),
        }
    }

    fn wake(&self, start: HostAddr, len: u64) -> io::Result<()> {
        let Some(first) = self.regions.page_at(start) else {
            return Ok(());
        };
        let state = &mut *self.state.borrow_mut();
        for page in first.get()..first.get() + len / self.page_bytes {
            if !state.filled[page as usize] {
                state.requests.try_again(page);
            }
        }
        Ok(())
    }

    /// Answers the oldest requests as far as all of their pages are there.
    fn settle(&self) -> io::Result<Settled> {
        let state = &mut *self.state.borrow_mut();
        while !state.over && state.requests.is_done(|page| state.filled[page as usize]) {
            if let Some(until) = state.doubt {
                let was_answered = state.requests.waiting() > 1;
                if !was_answered && Instant::now() < until {
                    break;
                }
                state.doubt = None;
                if was_answered {
                    let filled = &state.filled;
                    state.requests.take_done(|page| filled[page as usize]);
                    self.connection.take_request()?;
                    continue;
                }
            }
            let filled = &state.filled;
            state.requests.take_done(|page| filled[page as usize]);
            match self.connection.respond(Answer::Ok) {
                // It has ended, or let go of the guest, while it waited: no failure of ours.
                Err(error) if is_hang_up(&error) => {
                    state.over = true;
                    break;
                }
                responded => responded?,
            }
            self.connection.take_request()?;
        }
        Ok(if state.over {
            Settled::Over
        } else if state.requests.has_next() {
            Settled::MoreEvents
        } else {
            Settled::Quiet
        })
    }

    fn due(&self) -> Option<Instant> {
        let state = self.state.borrow();
        state.doubt.filter(|_| state.requests.waiting() > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use snapshot_format::PageCount;

    use super::requests::HEADER_BYTES;
    use crate::region::ClaimedRegion;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 8;

    fn engine(socket: &UnixStream, memory: &File, states: &PageStates) -> Postcopy {
        let claim = ClaimedRegion {
            base: 0,
            size: PAGES * PAGE,
            offset: 0,
            page_size: PAGE,
        };
        let regions = RegionTable::new(&[claim], PAGE, PageCount::new(PAGES)).unwrap();
        let connection = socket.try_clone().unwrap().into();
        Postcopy::new(connection, memory.try_clone().unwrap(), regions, states).unwrap()
    }

    fn ask(vmm: &mut UnixStream, page: u64) {
        let mut request = vec![9, 0, 0, 0, 0, 0, 0, 0];
        for word in [16, page * PAGE, PAGE] {
            request.extend_from_slice(&word.to_le_bytes());
        }
        vmm.write_all(&request).unwrap();
    }

    fn asked(engine: &Postcopy) -> Vec<u64> {
        let mut buffer = EventBuffer::default();
        engine.read_events(&mut buffer).unwrap();
        let page = |event| match event {
            Event::Fault { addr, .. } => addr.get() / PAGE,
            other => panic!("{other:?}"),
        };
        buffer.iter().map(page).collect()
    }

    #[test]
    fn a_successor_is_asked_what_its_predecessor_has_not_answered_and_nothing_else() {
        let (mut vmm, socket) = UnixStream::pair().unwrap();
        let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(PAGES * PAGE).unwrap();
        let states = PageStates::create(PageCount::new(PAGES)).unwrap();
        let first = engine(&socket, &memory, &states);
        ask(&mut vmm, 3);
        ask(&mut vmm, 5);
        assert_eq!(asked(&first), [3, 5]);
        assert_eq!(asked(&first).len(), 0, "it is told twice");
        assert_eq!(first.zero(HostAddr::new(3 * PAGE), PAGE).bytes, PAGE);
        states.set(PageIndex::new(3), crate::PageState::Zero);
        assert_eq!(first.settle().unwrap(), Settled::Quiet);
        // A part of another, which nobody will ever see whole.
        vmm.write_all(&[9, 0, 0]).unwrap();
        assert_eq!(asked(&first).len(), 0);
        drop(first);

        let second = engine(&socket, &memory, &states);
        assert_eq!(asked(&second), [5]);
        assert_eq!(second.zero(HostAddr::new(5 * PAGE), PAGE).bytes, PAGE);
        assert_eq!(second.settle().unwrap(), Settled::Quiet);
        let mut answers = [0; 2 * HEADER_BYTES];
        vmm.read_exact(&mut answers).unwrap();
        assert_eq!((answers[0], answers[HEADER_BYTES]), (1, 1));
        vmm.set_nonblocking(true).unwrap();
        assert!(vmm.read(&mut answers).is_err(), "one was answered twice");
        drop(vmm);
        assert_eq!(asked(&second).len(), 0);
        assert_eq!(second.settle().unwrap(), Settled::Over);
    }

    #[test]
    fn a_vmm_that_ends_while_it_waits_for_an_answer_has_ended_and_not_failed() {
        let (mut vmm, socket) = UnixStream::pair().unwrap();
        let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(PAGES * PAGE).unwrap();
        let states = PageStates::create(PageCount::new(PAGES)).unwrap();
        let engine = engine(&socket, &memory, &states);
        drop(socket);
        ask(&mut vmm, 3);
        assert_eq!(asked(&engine), [3]);
        drop(vmm);
        assert_eq!(engine.zero(HostAddr::new(3 * PAGE), PAGE).bytes, PAGE);
        assert_eq!(engine.settle().unwrap(), Settled::Over);
    }

    /// A successor of an engine that had all pages of a request installed.
    fn in_doubt() -> (UnixStream, Postcopy) {
        let (mut vmm, socket) = UnixStream::pair().unwrap();
        let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(PAGES * PAGE).unwrap();
        let states = PageStates::create(PageCount::new(PAGES)).unwrap();
        let first = engine(&socket, &memory, &states);
        ask(&mut vmm, 3);
        assert_eq!(asked(&first), [3]);
        assert_eq!(first.zero(HostAddr::new(3 * PAGE), PAGE).bytes, PAGE);
        states.set(PageIndex::new(3), crate::PageState::Zero);
        drop(first);
        (vmm, engine(&socket, &memory, &states))
    }

    #[test]
    fn after_a_surrender_no_request_is_taken_for_answered() {
        let (mut vmm, mut second) = in_doubt();
        second.trust_predecessor();
        ask(&mut vmm, 3);
        assert_eq!(asked(&second).len(), 0);
        assert_eq!(second.settle().unwrap(), Settled::Quiet);
        assert_eq!(second.due(), None);
        let mut answers = [0; 2 * HEADER_BYTES];
        vmm.read_exact(&mut answers).unwrap();
        assert_eq!((answers[0], answers[HEADER_BYTES]), (1, 1));
    }

    #[test]
    fn a_request_that_may_have_been_answered_was_if_another_follows() {
        let (mut vmm, second) = in_doubt();
        assert_eq!(asked(&second).len(), 0);
        assert_eq!(second.settle().unwrap(), Settled::Quiet);
        assert!(second.due().is_some());
        ask(&mut vmm, 5);
        assert_eq!(asked(&second), [5]);
        assert_eq!(second.zero(HostAddr::new(5 * PAGE), PAGE).bytes, PAGE);
        assert_eq!(second.settle().unwrap(), Settled::Quiet);
        assert_eq!(second.due(), None);
        let mut answer = [0; HEADER_BYTES];
        vmm.read_exact(&mut answer).unwrap();
        vmm.set_nonblocking(true).unwrap();
        assert!(vmm.read(&mut answer).is_err(), "both were answered");
    }

    #[test]
    fn a_request_that_may_have_been_answered_was_not_if_none_follows() {
        let (mut vmm, second) = in_doubt();
        assert_eq!(asked(&second).len(), 0);
        assert_eq!(second.settle().unwrap(), Settled::Quiet);
        let due = second.due().unwrap();
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        assert_eq!(second.settle().unwrap(), Settled::Quiet);
        let mut answer = [0; HEADER_BYTES];
        vmm.read_exact(&mut answer).unwrap();
        assert_eq!(answer[0], 1);
        assert_eq!(second.due(), None);
    }
}
