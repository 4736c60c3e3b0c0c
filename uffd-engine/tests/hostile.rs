//! What a broken or hostile VMM may send: refused with a reason, nothing leaked, other
//! sessions unharmed. A process of its own, because it counts descriptors.

mod support;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use snapshot_format::PageCount;
use support::{Host, PAGE, closed, has_uffd};
use uffd_engine::PageStates;
use uffd_engine::control::Report;
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
    let fds_before = open_descriptors();

    let cases: [(&str, Vec<u8>, Vec<std::os::fd::BorrowedFd<'_>>, &str); 6] = [
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
    ];
    for (name, bytes, fds, expected) in cases {
        let states = PageStates::create(PageCount::new(64)).unwrap();
        let socket = host.expect(name, &states, 5000);
        let peer = UnixStream::connect(&socket).unwrap();
        fdpass::send(peer.as_fd(), &bytes, &fds).unwrap();
        let Report::Refused { reason, .. } = host.report().0 else {
            panic!("{name} was accepted")
        };
        assert!(reason.contains(expected), "{name}: {reason}");
        assert!(closed(&peer), "{name}: the VMM is left waiting");
        std::fs::remove_file(socket).unwrap();
        host.forget(name);
    }
    guest.check(33);
    // The engine's threads may still have been closing their ends when they were counted first,
    // so fewer are no fault; six refused hand-offs that leak would be more.
    let leaked = || open_descriptors() > fds_before;
    let deadline = Instant::now() + Duration::from_secs(5);
    while leaked() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!leaked(), "descriptors leaked");
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
