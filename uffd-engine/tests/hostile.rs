//! What a broken or hostile VMM may send: refused with a reason, nothing leaked, other
//! sessions unharmed. A process of its own, because it counts descriptors.

mod support;

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use snapshot_format::PageCount;
use support::{Host, PAGE, closed, has_uffd};
use uffd_engine::PageStates;
use uffd_engine::control::Report;
use uffd_engine::region::ClaimedRegion;
use uffd_engine::sys::fdpass;
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};
use uffd_engine::vmm_side::GuestMemory;

#[test]
fn hostile_hand_offs_are_refused_and_harm_nobody() {
    if !has_uffd("hostile_hand_offs_are_refused_and_harm_nobody") {
        return;
    }
    let mut host = Host::start(64);
    let states = PageStates::create(PageCount::new(64)).unwrap();
    let guest = host.attach("good", &states);
    let message = |memory: &GuestMemory| uffd_engine::handoff::message(&[memory.as_region()]);
    let memory = GuestMemory::anonymous(64 * PAGE).unwrap();
    let small = GuestMemory::anonymous(32 * PAGE).unwrap();
    let uffd = Uffd::create(FEATURE_EVENT_REMOVE).unwrap();
    let (pipe, _other_end) = nix::unistd::pipe().unwrap();
    let claim = memory.as_region();
    let claims = |claims: &[ClaimedRegion]| uffd_engine::handoff::message(claims);
    let half = |offset_pages: u64, base_pages: u64| ClaimedRegion {
        base: claim.base + base_pages * PAGE,
        size: 32 * PAGE,
        offset: offset_pages * PAGE,
        page_size: PAGE,
    };
    let blocking = Uffd::create(FEATURE_EVENT_REMOVE)
        .unwrap()
        .try_clone()
        .unwrap();
    let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty());
    nix::fcntl::fcntl(&blocking, flags).unwrap();
    let fds_before = open_descriptors();

    let cases: [(&str, Vec<u8>, Vec<BorrowedFd<'_>>, &str); 17] = [
        (
            "json",
            b"{\"regions\":1}".to_vec(),
            vec![uffd.as_fd()],
            "not a list",
        ),
        ("nofd", message(&memory), vec![], "0 descriptors"),
        (
            "twofds",
            message(&memory),
            vec![uffd.as_fd(), uffd.as_fd()],
            "2 descriptors",
        ),
        (
            "pipe",
            message(&memory),
            vec![pipe.as_fd()],
            "not a userfaultfd",
        ),
        (
            "small",
            message(&small),
            vec![uffd.as_fd()],
            "32 pages, the build 64",
        ),
        (
            "empty",
            b"[]".to_vec(),
            vec![uffd.as_fd()],
            "no memory region",
        ),
        (
            "many",
            claims(&vec![claim; 1025]),
            vec![uffd.as_fd()],
            "1025 memory regions",
        ),
        (
            "overlap",
            claims(&[half(0, 0), half(32, 16)]),
            vec![uffd.as_fd()],
            "overlap in host addresses",
        ),
        (
            "twice",
            claims(&[half(0, 0), half(0, 32)]),
            vec![uffd.as_fd()],
            "overlap or leave a hole",
        ),
        (
            "hole",
            claims(&[half(0, 0), half(40, 32)]),
            vec![uffd.as_fd()],
            "overlap or leave a hole",
        ),
        (
            "unaligned",
            claims(&[ClaimedRegion {
                base: claim.base + 8,
                ..claim
            }]),
            vec![uffd.as_fd()],
            "not a multiple of the page size",
        ),
        (
            "pagesize",
            claims(&[ClaimedRegion {
                page_size: 2 << 20,
                ..claim
            }]),
            vec![uffd.as_fd()],
            "pages of another size",
        ),
        (
            "wraps",
            claims(&[ClaimedRegion {
                base: u64::MAX - 0xFFF,
                ..claim
            }]),
            vec![uffd.as_fd()],
            "leaves the address space",
        ),
        (
            "trailing",
            [message(&memory), message(&memory)].concat(),
            vec![uffd.as_fd()],
            "goes on after",
        ),
        (
            "endless",
            vec![b' '; 256 << 10],
            vec![uffd.as_fd()],
            "longer than",
        ),
        (
            "blocking",
            message(&memory),
            vec![blocking.as_fd()],
            "is blocking",
        ),
        (
            "hangsup",
            b"[{".to_vec(),
            vec![uffd.as_fd()],
            "closed the hand-off after 2 bytes",
        ),
    ];
    for (name, bytes, fds, expected) in cases {
        let states = PageStates::create(PageCount::new(64)).unwrap();
        let socket = host.expect(name, &states, 5000);
        let peer = UnixStream::connect(&socket).unwrap();
        // The engine may refuse before a long message is all sent.
        let sent = fdpass::send(peer.as_fd(), &bytes, &fds);
        assert!(sent.is_ok() || name == "endless", "{name}: {sent:?}");
        if name == "hangsup" {
            peer.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let Report::Refused { reason, .. } = host.report().0 else {
            panic!("{name} was accepted")
        };
        assert!(reason.contains(expected), "{name}: {reason}");
        assert!(closed(&peer), "{name}: the VMM is left waiting");
        std::fs::remove_file(socket).unwrap();
        host.forget(name);
    }
    guest.check(33);
    // A polled descriptor is let go of a little later than the refusal is told.
    let patience = Instant::now() + Duration::from_secs(5);
    while open_descriptors() > fds_before && Instant::now() < patience {
        std::thread::yield_now();
    }
    let left = open_descriptors();
    assert!(
        left <= fds_before,
        "descriptors leaked: {fds_before}, then {left}"
    );
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
