//! A VMM that asks for pages over its socket, as Cloud Hypervisor does after
//! `receive-migration memory_mode=postcopy`; this process plays it.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek64};
use snapshot_format::PageCount;
use support::{Host, PAGE, content, evict, resident_pages, skip};
use uffd_engine::control::{self, Report, Request};
use uffd_engine::region::ClaimedRegion;
use uffd_engine::sys::process::pidfd_open;
use uffd_engine::{PageStates, SessionStats};

const PAGES: u64 = 256;
/// Where the second region of the guest begins: after a hole, as PCI's.
const HIGH: u64 = 1 << 32;
const LOW_PAGES: u64 = 160;

// Source: Cloud Hypervisor `vm-migration/src/protocol.rs`.
const PAGE_FAULT: u16 = 9;
const STATUS_OK: u16 = 1;
const STATUS_ERROR: u16 = 2;

struct Vmm {
    socket: UnixStream,
    memory: File,
    _states: PageStates,
}

fn claims() -> Vec<ClaimedRegion> {
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
fn begin(host: &mut Host, session: &str, memory_bytes: u64) -> (Report, Vmm) {
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

fn attach(host: &mut Host, session: &str) -> Vmm {
    let (report, vmm) = begin(host, session, PAGES * PAGE);
    assert!(
        matches!(report, Report::Attached { request: 4711, .. }),
        "{report:?}"
    );
    vmm
}

fn gpa(page: u64) -> u64 {
    if page < LOW_PAGES {
        page * PAGE
    } else {
        HIGH + (page - LOW_PAGES) * PAGE
    }
}

impl Vmm {
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
        let mut response = [0; 16];
        self.socket.read_exact(&mut response).unwrap();
        u16::from_le_bytes([response[0], response[1]])
    }

    fn word(&self, page: u64) -> u64 {
        // It must be there, not just read as zero.
        let at = (page * PAGE) as i64;
        let data = lseek64(&self.memory, at, Whence::SeekData);
        assert_eq!(data, Ok(at), "page {page} is a hole");
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, page * PAGE).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn check(&self, page: u64) {
        assert_eq!(self.word(page), content(page).unwrap_or(0), "page {page}");
    }

    /// Hangs up; what the engine did for it.
    fn end(self, host: &mut Host, session: &str) -> SessionStats {
        drop(self.socket);
        match host.report().0 {
            Report::Ended { session: ended } => assert_eq!(ended, session),
            other => panic!("expected the session's end, got {other:?}"),
        }
        host.detach(session)
    }
}

#[test]
fn every_page_that_is_asked_for_is_in_the_memfd_when_the_answer_comes() {
    let mut host = Host::start(PAGES);
    let mut vmm = attach(&mut host, "ch");
    for page in (0..PAGES).rev().filter(|page| page % 3 == 0) {
        vmm.request(PAGE_FAULT, gpa(page), PAGE);
        assert_eq!(vmm.response(), STATUS_OK);
        vmm.check(page);
    }
    // Many at once, some of them there already, more than one turn takes; and the same again.
    for _ in 0..2 {
        vmm.request(PAGE_FAULT, 0, LOW_PAGES * PAGE);
        assert_eq!(vmm.response(), STATUS_OK);
        (0..LOW_PAGES).for_each(|page| vmm.check(page));
    }
    let stats = vmm.end(&mut host, "ch");
    assert!(stats.pages_installed >= LOW_PAGES, "{stats:?}");
}

#[test]
fn requests_that_wait_for_the_disk_are_all_answered_in_their_order() {
    const NAME: &str = "requests_that_wait_for_the_disk_are_all_answered_in_their_order";
    let mut host = Host::start(PAGES);
    evict(&host.data_file());
    if resident_pages(&host.data_file()).iter().all(|page| *page) {
        return skip(NAME, "the file system would not let go of its pages");
    }
    let mut vmm = attach(&mut host, "ch");
    for page in 0..PAGES {
        vmm.request(PAGE_FAULT, gpa(page), PAGE);
    }
    for page in 0..PAGES {
        assert_eq!(vmm.response(), STATUS_OK);
        vmm.check(page);
    }
    let stats = vmm.end(&mut host, "ch");
    assert!(stats.pages_read > 0, "{stats:?}");
    assert_eq!(stats.pages_installed, PAGES);
}

#[test]
fn what_the_guest_wrote_is_not_overwritten_and_what_it_gave_back_is_zero() {
    let mut host = Host::start(PAGES);
    let mut vmm = attach(&mut host, "ch");
    let ask = |vmm: &mut Vmm, page| {
        vmm.request(PAGE_FAULT, gpa(page), PAGE);
        assert_eq!(vmm.response(), STATUS_OK);
    };
    ask(&mut vmm, 8);
    vmm.check(8);
    vmm.memory.write_all_at(b"mine1234", 8 * PAGE).unwrap();
    ask(&mut vmm, 8);
    assert_eq!(vmm.word(8), u64::from_le_bytes(*b"mine1234"));
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&vmm.memory, punch, 8 * PAGE as i64, PAGE as i64).unwrap();
    ask(&mut vmm, 8);
    assert_eq!(vmm.word(8), 0, "it came back as it was in the build");
    vmm.end(&mut host, "ch");
}

#[test]
fn what_is_no_request_fails_the_session_with_a_reason_and_no_other() {
    let mut host = Host::start(PAGES);
    let mut good = attach(&mut host, "good");
    for (number, (command, gpa, length)) in [
        (3, 0, PAGE),
        (PAGE_FAULT, LOW_PAGES * PAGE, PAGE),
        (PAGE_FAULT, (LOW_PAGES - 1) * PAGE, 2 * PAGE),
        (PAGE_FAULT, 0, 0),
        (PAGE_FAULT, 0, u64::MAX),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("bad-{number}");
        let mut vmm = attach(&mut host, &name);
        vmm.request(command, gpa, length);
        match host.report().0 {
            Report::Failed { session, reason } => {
                assert_eq!(session, name);
                assert!(reason.contains("page request") || reason.contains("guest address"));
            }
            other => panic!("expected a failure, got {other:?}"),
        }
        host.detach(&name);
        good.request(PAGE_FAULT, 0, PAGE);
        assert_eq!(good.response(), STATUS_OK);
    }
    good.end(&mut host, "good");
}

#[test]
fn a_page_that_is_cut_off_its_build_is_an_error_for_the_vmm() {
    let mut host = Host::start(PAGES);
    let mut vmm = attach(&mut host, "ch");
    let data = File::options().write(true).open(host.data_file()).unwrap();
    data.set_len(PAGE).unwrap();
    let last = (0..PAGES).rev().find(|page| content(*page).is_some());
    vmm.request(PAGE_FAULT, gpa(last.unwrap()), PAGE);
    assert_eq!(vmm.response(), STATUS_ERROR);
    match host.report().0 {
        Report::Failed { session, .. } => assert_eq!(session, "ch"),
        other => panic!("expected a failure, got {other:?}"),
    }
}

#[test]
fn memory_that_is_too_short_is_refused() {
    let mut host = Host::start(PAGES);
    match begin(&mut host, "ch", (PAGES - 1) * PAGE).0 {
        Report::Refused { reason, .. } => assert!(reason.contains("memory file"), "{reason}"),
        other => panic!("expected a refusal, got {other:?}"),
    }
}
