//! A VMM that asks for pages over its socket, as Cloud Hypervisor does after
//! `receive-migration memory_mode=postcopy`; this process plays it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek64};
use snapshot_format::PageCount;
use uffd_engine::control::{self, Report, Request};
use uffd_engine::region::ClaimedRegion;
use uffd_engine::sys::process::pidfd_open;
use uffd_engine::{PageStates, SessionStats};

use super::{Host, PAGE, content};

pub const PAGES: u64 = 256;
/// Where the second region of the guest begins: after a hole, as PCI's.
pub const HIGH: u64 = 1 << 32;
pub const LOW_PAGES: u64 = 160;

// Source: Cloud Hypervisor `vm-migration/src/protocol.rs`.
pub const PAGE_FAULT: u16 = 9;
pub const STATUS_OK: u16 = 1;
pub const STATUS_ERROR: u16 = 2;

pub struct Vmm {
    pub socket: UnixStream,
    pub memory: File,
    _states: PageStates,
}

pub fn claims() -> Vec<ClaimedRegion> {
    let region = |base, first: u64, pages: u64| ClaimedRegion {
        base,
        size: pages * PAGE,
        offset: first * PAGE,
        page_size: PAGE,
    };
    vec![
        region(0, 0, LOW_PAGES),
        region(HIGH, LOW_PAGES, PAGES - LOW_PAGES),
    ]
}

/// Asks the engine to serve a VMM's pages; its answer.
pub fn begin(host: &mut Host, session: &str, memory_bytes: u64) -> (Report, Vmm) {
    let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
    memory.set_len(memory_bytes).unwrap();
    let states = PageStates::create(PageCount::new(PAGES)).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let pidfd = pidfd_open(std::process::id() as i32).unwrap();
    let request = Request::ServePages {
        request: 4711,
        session: session.to_owned(),
        store: host.store.root().to_path_buf(),
        build: host.build,
        regions: claims(),
        surrendered: false,
    };
    let fds = [
        theirs.as_fd(),
        memory.as_fd(),
        pidfd.as_fd(),
        states.as_fd(),
    ];
    control::send(host.control.as_fd(), &request, &fds).unwrap();
    let vmm = Vmm {
        socket: ours,
        memory,
        _states: states,
    };
    (host.report().0, vmm)
}

pub fn attach(host: &mut Host, session: &str) -> Vmm {
    let (report, vmm) = begin(host, session, PAGES * PAGE);
    assert!(
        matches!(report, Report::Attached { request: 4711, .. }),
        "{report:?}"
    );
    vmm
}

pub fn gpa(page: u64) -> u64 {
    if page < LOW_PAGES {
        page * PAGE
    } else {
        HIGH + (page - LOW_PAGES) * PAGE
    }
}

impl Vmm {
    pub fn request(&mut self, command: u16, gpa: u64, length: u64) {
        let mut request = vec![0u8; 8];
        request[..2].copy_from_slice(&command.to_le_bytes());
        for word in [16, gpa, length] {
            request.extend_from_slice(&word.to_le_bytes());
        }
        // In two parts: a stream may split it anywhere.
        self.socket.write_all(&request[..5]).unwrap();
        self.socket.write_all(&request[5..]).unwrap();
    }

    pub fn response(&mut self) -> u16 {
        let mut response = [0; 16];
        self.socket.read_exact(&mut response).unwrap();
        u16::from_le_bytes([response[0], response[1]])
    }

    pub fn word(&self, page: u64) -> u64 {
        // It must be there, not just read as zero.
        let at = (page * PAGE) as i64;
        let data = lseek64(&self.memory, at, Whence::SeekData);
        assert_eq!(data, Ok(at), "page {page} is a hole");
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, page * PAGE).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn check(&self, page: u64) {
        assert_eq!(self.word(page), content(page).unwrap_or(0), "page {page}");
    }

    /// The guest writes the first word of a page.
    pub fn write(&self, page: u64, word: u64) {
        self.memory
            .write_all_at(&word.to_le_bytes(), page * PAGE)
            .unwrap();
    }

    /// Whether there is no answer to be read.
    pub fn is_silent(&mut self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let read = self.socket.read(&mut [0; 1]);
        self.socket.set_nonblocking(false).unwrap();
        matches!(read, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// Hangs up; what the engine did for it.
    pub fn end(self, host: &mut Host, session: &str) -> SessionStats {
        drop(self.socket);
        match host.report().0 {
            Report::Ended { session: ended } => assert_eq!(ended, session),
            other => panic!("expected the session's end, got {other:?}"),
        }
        host.detach(session)
    }
}
