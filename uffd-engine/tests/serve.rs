//! The engine against the real kernel: memory of this process, faulted in by threads of
//! this process, served by an engine's worker in this process.

mod support;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use snapshot_format::{PageCount, PageIndex};
use support::{Host, PAGE, closed, content, evict, has_uffd, read_part, resident_pages, skip};
use uffd_engine::control::Report;
use uffd_engine::server::EngineOptions;
use uffd_engine::{PageState, PageStates, Waiting, WorkerOptions};

#[test]
fn every_page_reads_as_the_build_says() {
    if !has_uffd("every_page_reads_as_the_build_says") {
        return;
    }
    let mut host = Host::start(512);
    let states = PageStates::create(PageCount::new(512)).unwrap();
    let guest = host.attach("s1", &states);
    for page in (0..512).rev() {
        guest.check(page);
    }
    let stats = host.detach("s1");
    assert!(stats.faults > 0 && stats.faults <= 512, "{stats:?}");
    assert_eq!(stats.pages_installed, 512);
    assert_eq!(stats.pages_zeroed, 128, "{stats:?}");
    assert_eq!(stats.pages_copied + stats.pages_zeroed, 512, "{stats:?}");
}

#[test]
fn pages_that_are_not_in_the_page_cache_are_read_without_a_major_fault() {
    const NAME: &str = "pages_that_are_not_in_the_page_cache_are_read_without_a_major_fault";
    if !has_uffd(NAME) {
        return;
    }
    let mut host = Host::start(2048);
    let data = host.data_file();
    evict(&data);
    // A part of it is in the page cache, so that both ways are gone, and both in one chunk.
    let stored = std::fs::metadata(&data).unwrap().len();
    let (from, to) = (stored / 4 / PAGE * PAGE, stored / 2 / PAGE * PAGE);
    read_part(&data, from, to - from);
    let resident = resident_pages(&data);
    if resident.iter().all(|page| *page) {
        return skip(NAME, "the file system would not let go of its pages");
    }
    let states = PageStates::create(PageCount::new(2048)).unwrap();
    let guest = host.attach("s1", &states);
    let before = host.stats("s1").worker_major_faults;
    for page in (0..2048).step_by(3).chain(0..2048) {
        guest.check(page);
    }
    let stats = host.detach("s1");
    assert_eq!(stats.worker_major_faults, before, "{stats:?}");
    assert!(stats.pages_read > 0, "{stats:?}");
    assert!(stats.pages_copied > stats.pages_read, "{stats:?}");
}

#[test]
fn a_page_given_back_reads_as_zero() {
    if !has_uffd("a_page_given_back_reads_as_zero") {
        return;
    }
    let mut host = Host::start(64);
    let states = PageStates::create(PageCount::new(64)).unwrap();
    let guest = host.attach("s1", &states);
    guest.check(0);
    guest.check(20);
    guest.memory.give_back(0, 32 * PAGE).unwrap();
    assert_eq!(guest.memory.read(0), 0, "an installed page");
    assert_eq!(
        guest.memory.read(9 * PAGE),
        0,
        "a page that was never touched"
    );
    guest.check(32);
    assert_eq!(states.get(PageIndex::new(1)), PageState::Removed);
    assert_eq!(host.stats("s1").removes, 1);
}

#[test]
fn a_spinning_worker_looks_after_every_session() {
    if !has_uffd("a_spinning_worker_looks_after_every_session") {
        return;
    }
    let mut host = Host::start(1024);
    host.replace_engine_by(EngineOptions {
        worker: WorkerOptions {
            waiting: Waiting::Spin { us: 1_000_000 },
            window_pages: 1,
            ..WorkerOptions::default()
        },
        ..EngineOptions::default()
    });
    let states: Vec<_> = (0..3)
        .map(|_| PageStates::create(PageCount::new(1024)).unwrap())
        .collect();
    let name = |session: usize| format!("s{session}");
    let guests: Vec<_> = states
        .iter()
        .enumerate()
        .map(|(session, states)| host.attach(&name(session), states))
        .collect();
    std::thread::scope(|scope| {
        for guest in &guests {
            scope.spawn(|| (0..1024).for_each(|page| guest.check(page)));
        }
    });
    for session in 0..3 {
        assert_eq!(host.detach(&name(session)).faults, 1024);
    }
}

#[test]
fn faults_and_removes_from_many_threads_lose_no_fault() {
    if !has_uffd("faults_and_removes_from_many_threads_lose_no_fault") {
        return;
    }
    let mut host = Host::start(1024);
    let states = PageStates::create(PageCount::new(1024)).unwrap();
    let guest = host.attach("s1", &states);
    std::thread::scope(|scope| {
        for start in 0..4u64 {
            let memory = &guest.memory;
            scope.spawn(move || {
                for round in 0..20u64 {
                    for step in 0..128u64 {
                        let page = (step * 8 + start + round) % 1024;
                        let found = memory.read(page * PAGE);
                        let expected = content(page).unwrap_or(0);
                        assert!(found == expected || found == 0, "page {page}: {found:#x}");
                    }
                }
            });
        }
        for round in 0..200u64 {
            guest
                .memory
                .give_back((round % 64) * 16 * PAGE, 16 * PAGE)
                .unwrap();
        }
    });
    // All of it is reachable still.
    for page in 0..1024 {
        let found = guest.memory.read(page * PAGE);
        assert!(
            found == content(page).unwrap_or(0) || found == 0,
            "page {page}"
        );
    }
    assert!(host.stats("s1").removes > 0);
}

#[test]
fn a_successor_goes_on_where_its_engine_died() {
    if !has_uffd("a_successor_goes_on_where_its_engine_died") {
        return;
    }
    let mut host = Host::start(256);
    let states = PageStates::create(PageCount::new(256)).unwrap();
    let guest = host.attach("s1", &states);
    guest.check(5);
    guest.memory.write(5 * PAGE, 42);
    guest.memory.give_back(64 * PAGE, PAGE).unwrap();
    host.replace_engine();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| guest.check(200));
        // It waits in the kernel, with nobody to answer.
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        host.adopt("s1", &guest, &states);
        waiting.join().unwrap();
    });
    assert_eq!(guest.memory.read(5 * PAGE), 42, "what the guest wrote");
    assert_eq!(
        guest.memory.read(64 * PAGE),
        0,
        "what was given back before"
    );
    for page in 100..256 {
        guest.check(page);
    }
}

#[test]
fn a_damaged_file_fails_the_session_and_says_so() {
    if !has_uffd("a_damaged_file_fails_the_session_and_says_so") {
        return;
    }
    let mut host = Host::start(256);
    let states = PageStates::create(PageCount::new(256)).unwrap();
    let guest = host.attach("s1", &states);
    guest.check(0);
    let other_states = PageStates::create(PageCount::new(256)).unwrap();
    let other = host.attach("s2", &other_states);
    // The file shrinks under a running guest: its mapping is gone, its reads are short.
    let file = std::fs::File::options()
        .write(true)
        .open(host.data_file())
        .unwrap();
    file.set_len(64 * PAGE).unwrap();
    let touched = guest.memory.probe(250 * PAGE);
    let (report, _) = host.report();
    let Report::Failed { session, reason } = report else {
        panic!("{report:?}")
    };
    assert_eq!(session, "s1");
    assert!(reason.contains("build"), "{reason}");
    assert!(
        touched.is_err(),
        "a page that can't be had must not read as anything"
    );
    other.check(1);
}

#[test]
fn a_peer_that_never_sends_is_given_up_at_the_deadline() {
    if !has_uffd("a_peer_that_never_sends_is_given_up_at_the_deadline") {
        return;
    }
    let mut host = Host::start(64);
    let states = PageStates::create(PageCount::new(64)).unwrap();
    let socket = host.expect("silent", &states, 50);
    let mut peer = UnixStream::connect(&socket).unwrap();
    peer.write_all(b"[{\"base_host").unwrap();
    let Report::Refused { reason, .. } = host.report().0 else {
        panic!("it was accepted")
    };
    assert!(reason.contains("deadline"), "{reason}");
    assert!(closed(&peer));
}

#[test]
fn idle_sessions_move_to_workers_that_have_fewer_and_are_served_there() {
    const NAME: &str = "idle_sessions_move_to_workers_that_have_fewer_and_are_served_there";
    if !has_uffd(NAME) {
        return;
    }
    let mut host = Host::start(256);
    let cpus = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    let cpu = (0..nix::sched::CpuSet::count()).find(|cpu| cpus.is_set(*cpu).unwrap());
    host.replace_engine_by(EngineOptions {
        cpus: vec![cpu.unwrap(); 2],
        worker: WorkerOptions {
            window_pages: 1,
            ..WorkerOptions::default()
        },
        ..EngineOptions::default()
    });
    let states: Vec<_> = (0..6)
        .map(|_| PageStates::create(PageCount::new(256)).unwrap())
        .collect();
    // They go to both workers in turn.
    let name = |session: usize| format!("s{session}");
    let guests: Vec<_> = (0..6)
        .map(|session| host.attach(&name(session), &states[session]))
        .collect();
    guests
        .iter()
        .for_each(|guest| (0..64).for_each(|page| guest.check(page)));
    // Longer than a session has to be idle.
    std::thread::sleep(Duration::from_millis(100));
    // Three leave one worker: the other has three still, and gives one away.
    for session in [0, 2, 4] {
        host.detach(&name(session));
    }
    for session in [1, 3, 5] {
        (64..256).for_each(|page| guests[session].check(page));
        let stats = host.stats(&name(session));
        assert_eq!(stats.pages_installed, 256, "{stats:?}");
    }
    let stats: Vec<_> = [1, 3, 5].map(|session| host.detach(&name(session))).into();
    let moves: u64 = stats.iter().map(|stats| stats.moves).sum();
    assert_eq!(moves, 1, "{stats:?}");
    // Counters move along.
    assert!(stats.iter().all(|stats| stats.faults == 256), "{stats:?}");
}

#[test]
fn placed_sessions_stay_with_their_worker() {
    const NAME: &str = "placed_sessions_stay_with_their_worker";
    if !has_uffd(NAME) {
        return;
    }
    let mut host = Host::start(64);
    host.replace_engine_by(EngineOptions {
        cpus: vec![0; 2],
        keep_placement: true,
        ..EngineOptions::default()
    });
    let states: Vec<_> = (0..6)
        .map(|_| PageStates::create(PageCount::new(64)).unwrap())
        .collect();
    let name = |session: usize| format!("s{session}");
    let guests: Vec<_> = (0..6)
        .map(|session| host.attach(&name(session), &states[session]))
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    for session in [0, 2, 4] {
        host.detach(&name(session));
    }
    for session in [1, 3, 5] {
        guests[session].check(1);
        assert_eq!(host.detach(&name(session)).moves, 0);
    }
}
