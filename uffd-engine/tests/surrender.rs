//! Sessions that leave their engine while their guests go on, for a successor of another daemon.

mod support;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::stat::Mode;
use snapshot_format::{BuildStore, PageCount, PageIndex};
use support::asking::{self, PAGE_FAULT, STATUS_OK, Vmm, gpa};
use support::{Guest, Host, PAGE, Surrendered, closed, content, evict, has_uffd};
use uffd_engine::control::{self, Report, Request, Succession};
use uffd_engine::sys::process::pidfd_open;
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, Uffd};
use uffd_engine::vmm_side::{self, GuestMemory};
use uffd_engine::{PageState, PageStates, Tracking};

/// As many as a VMM of [`asking`] has.
const PAGES: u64 = asking::PAGES;

fn table(pages: u64) -> PageStates {
    PageStates::create(PageCount::new(pages)).unwrap()
}

/// What a guest writes to a page that it has read.
fn mark(page: u64) -> u64 {
    0x3A3A_0000_0000_0000 | page
}

/// A guest that reads every page once, writes to some and gives some back; then it looks at all of
/// it again. Counts its steps.
fn walk(guest: &Guest, steps: &AtomicU64, pages: u64) {
    let memory = &guest.memory;
    for page in (0..pages).map(|step| step * 37 % pages) {
        guest.check(page);
        match page % 8 {
            1 => memory.write(page * PAGE, mark(page)),
            5 => {
                memory.give_back(page * PAGE, PAGE).unwrap();
                assert_eq!(memory.read(page * PAGE), 0, "page {page} was given back");
            }
            _ => {}
        }
        steps.fetch_add(1, Ordering::Relaxed);
    }
    for page in 0..pages {
        match page % 8 {
            1 => assert_eq!(memory.read(page * PAGE), mark(page), "page {page} was lost"),
            5 => assert_eq!(memory.read(page * PAGE), 0, "page {page} came back"),
            _ => guest.check(page),
        }
    }
}

/// The same for one that asks for its pages, as a VMM of two threads does, and punches no holes.
fn walk_asking(vmm: &mut Vmm, steps: &AtomicU64) {
    let pages: Vec<u64> = (0..PAGES).map(|step| step * 37 % PAGES).collect();
    for two in pages.chunks(2) {
        two.iter()
            .for_each(|page| vmm.request(PAGE_FAULT, gpa(*page), PAGE));
        for page in two {
            assert_eq!(vmm.response(), STATUS_OK);
            vmm.check(*page);
            vmm.write(*page, mark(*page));
            steps.fetch_add(1, Ordering::Relaxed);
        }
    }
    for page in 0..PAGES {
        assert_eq!(vmm.word(page), mark(page), "page {page} was lost");
    }
    assert!(vmm.is_silent(), "a request was answered twice");
}

/// Waits until a walker has got so far, or has failed.
fn wait_for(steps: &AtomicU64, many: u64, walker: &ScopedJoinHandle<'_, ()>) {
    while steps.load(Ordering::Relaxed) < many && !walker.is_finished() {
        std::thread::yield_now();
    }
}

#[test]
fn guests_of_both_kinds_go_on_through_one_engine_after_the_other() {
    if !has_uffd("guests_of_both_kinds_go_on_through_one_engine_after_the_other") {
        return;
    }
    let mut host = Host::start(PAGES);
    let states = [table(PAGES), table(PAGES)];
    let guests = [host.attach("u1", &states[0]), host.attach("u2", &states[1])];
    let mut asking = asking::attach(&mut host, "ch");
    let steps: [AtomicU64; 3] = Default::default();
    std::thread::scope(|scope| {
        let walkers = [
            scope.spawn(|| walk(&guests[0], &steps[0], PAGES)),
            scope.spawn(|| walk(&guests[1], &steps[1], PAGES)),
            scope.spawn(|| walk_asking(&mut asking, &steps[2])),
        ];
        for round in 1..=8u64 {
            // Everybody has got somewhere since the last time.
            for (steps, walker) in steps.iter().zip(&walkers) {
                wait_for(steps, round * PAGES / 10, walker);
            }
            // What the kernel lets go of is read from the disk.
            evict(&host.data_file());
            let mut all = host.surrender();
            all.sort_by(|one, other| one.session().cmp(other.session()));
            let names: Vec<_> = all.iter().map(Surrendered::session).collect();
            assert_eq!(names, ["ch", "u1", "u2"]);
            all.iter().for_each(|session| host.take_over(session));
        }
        walkers
            .into_iter()
            .for_each(|walker| walker.join().unwrap());
    });
    for (session, states) in ["u1", "u2"].into_iter().zip(&states) {
        let stats = host.detach(session);
        assert_eq!(stats.pages_installed, PAGES, "{stats:?}");
        // The last engine was there for the last fifth, and did no more than what was missing.
        let installed = stats.pages_copied + stats.pages_read + stats.pages_zeroed;
        assert!(installed <= PAGES / 2, "{stats:?}");
        let left = (0..PAGES).map(|page| states.get(PageIndex::new(page)));
        assert!(left.into_iter().all(PageState::is_installed));
    }
    assert!(asking.end(&mut host, "ch").pages_installed == PAGES);
}

#[test]
fn what_a_session_was_told_is_said_of_it() {
    if !has_uffd("what_a_session_was_told_is_said_of_it") {
        return;
    }
    let mut host = Host::start(PAGES);
    let (told, untold) = (table(PAGES), table(PAGES));
    let guest = host.attach("told", &told);
    let _other = host.attach("untold", &untold);
    let load = |request| Request::Load {
        request,
        session: "told".into(),
        bytes_per_second: 1,
    };
    assert!(matches!(host.ask(load).0, Report::Stats { .. }));
    let tracks = matches!(host.track("told", Tracking::Events), Report::Stats { .. });
    let region = guest.memory.as_region();
    let (store, id) = (host.store.root().to_path_buf(), host.build);
    let all = host.surrender();
    assert_eq!(all.len(), 2);
    for surrendered in &all {
        let Report::Surrendered {
            session,
            store: from,
            build,
            succession,
            regions,
            tracking,
            replays,
            load_bytes_per_second,
        } = &surrendered.report
        else {
            unreachable!("nothing else is kept")
        };
        let is_told = session == "told";
        assert_eq!((from, *build), (&store, id));
        assert_eq!(*succession, Succession::Adopt);
        assert_eq!(regions[..] == [region], is_told);
        assert_eq!(*tracking == Tracking::Events, is_told && tracks);
        assert_eq!(*load_bytes_per_second, is_told.then_some(1));
        assert!(!replays);
    }
    all.iter().for_each(|session| host.take_over(session));
    (0..PAGES).for_each(|page| guest.check(page));
}

#[test]
fn who_has_no_memory_of_a_build_is_let_go() {
    if !has_uffd("who_has_no_memory_of_a_build_is_let_go") {
        return;
    }
    let mut host = Host::start(PAGES);
    let states = table(PAGES);
    let guest = host.attach("served", &states);
    // One that nobody has come to, one that somebody has come to, and one of a plain file.
    let (none, some, file) = (table(PAGES), table(PAGES), table(PAGES));
    host.expect("waiting", &none, 60_000);
    let peer = UnixStream::connect(host.expect("begun", &some, 60_000)).unwrap();
    let memory_file = host.dir.path().join("plain");
    std::fs::write(&memory_file, vec![7; (PAGES * PAGE) as usize]).unwrap();
    let socket = host.expect_by("plain", &file, |request| Request::ExpectFile {
        request,
        session: "plain".into(),
        file: memory_file,
        page_bytes: PAGE,
        deadline_ms: 5000,
    });
    let plain = GuestMemory::anonymous(PAGES * PAGE).unwrap();
    let uffd = Uffd::create(FEATURE_EVENT_REMOVE).unwrap();
    plain.register(&uffd).unwrap();
    let plain_vmm = vmm_side::hand_off(&socket, &uffd, &[plain.as_region()]).unwrap();
    assert!(matches!(host.report().0, Report::Attached { .. }));

    let all = host.surrender();
    let names: Vec<_> = all.iter().map(Surrendered::session).collect();
    assert_eq!(names, ["served"]);
    assert!(closed(&peer), "somebody waits for an engine that has ended");
    assert!(closed(&plain_vmm), "the session of a plain file is kept");
    host.take_over(&all[0]);
    (0..PAGES).for_each(|page| guest.check(page));
}

#[test]
fn a_daemon_that_takes_nothing_leaves_its_guests_served() {
    if !has_uffd("a_daemon_that_takes_nothing_leaves_its_guests_served") {
        return;
    }
    let mut host = Host::start(PAGES);
    let states = table(PAGES);
    let guest = host.attach("u", &states);
    let mut asking = asking::attach(&mut host, "ch");
    let steps: [AtomicU64; 2] = Default::default();
    std::thread::scope(|scope| {
        let walkers = [
            scope.spawn(|| walk(&guest, &steps[0], PAGES)),
            scope.spawn(|| walk_asking(&mut asking, &steps[1])),
        ];
        for round in 1..=8 {
            for (steps, walker) in steps.iter().zip(&walkers) {
                wait_for(steps, round * PAGES / 10, walker);
            }
            evict(&host.data_file());
            // It is killed when it has asked.
            shutdown(
                std::os::fd::AsRawFd::as_raw_fd(&host.control),
                Shutdown::Read,
            )
            .unwrap();
            let request = Request::Surrender { request: round };
            control::send(host.control.as_fd(), &request, &[]).unwrap();
            host.reconnect();
        }
        walkers
            .into_iter()
            .for_each(|walker| walker.join().unwrap());
    });
    // The same engine: its counters are of all that was done.
    let stats = host.stats("u");
    let installed = stats.pages_copied + stats.pages_read + stats.pages_zeroed;
    assert!(installed >= PAGES, "{stats:?}");
    let all = host.surrender();
    assert_eq!(all.len(), 2);
    all.iter().for_each(|session| host.take_over(session));
    asking.end(&mut host, "ch");
}

#[test]
fn reports_wait_for_a_daemon_that_is_slow_to_take_them() {
    const MANY: usize = 40;
    let mut host = Host::start(PAGES);
    // Together longer than what a socket keeps.
    let name = |number: usize| format!("{number}-{}", "x".repeat(10_000));
    let mut asking: Vec<_> = (0..MANY)
        .map(|number| asking::attach(&mut host, &name(number)))
        .collect();
    let request = Request::Surrender { request: 4712 };
    control::send(host.control.as_fd(), &request, &[]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let all = host.surrendered(4712);
    assert_eq!(all.len(), MANY);
    all.iter().for_each(|session| host.take_over(session));
    for vmm in &mut asking {
        vmm.request(PAGE_FAULT, gpa(9), PAGE);
        assert_eq!(vmm.response(), STATUS_OK);
        vmm.check(9);
    }
}

#[test]
fn a_session_whose_build_is_being_opened_still_is_surrendered_at_once() {
    if !has_uffd("a_session_whose_build_is_being_opened_still_is_surrendered_at_once") {
        return;
    }
    let mut host = Host::start(PAGES);
    // The same build in another store, where one of its files can't be opened yet.
    let other = BuildStore::open_or_create(&host.dir.path().join("slow")).unwrap();
    let (here, there) = (host.store.path(&host.build), other.path(&host.build));
    std::fs::create_dir(&there).unwrap();
    for entry in std::fs::read_dir(&here).unwrap() {
        let name = entry.unwrap().file_name();
        std::fs::copy(here.join(&name), there.join(&name)).unwrap();
    }
    // The first of them that is opened: of others the length is looked at before.
    let stuck = there.join("manifest.json");
    std::fs::remove_file(&stuck).unwrap();
    nix::unistd::mkfifo(&stuck, Mode::S_IRWXU).unwrap();

    let states = table(PAGES);
    let memory = Arc::new(GuestMemory::anonymous(PAGES * PAGE).unwrap());
    let uffd = Uffd::create(FEATURE_EVENT_REMOVE).unwrap();
    memory.register(&uffd).unwrap();
    let pidfd = pidfd_open(std::process::id() as i32).unwrap();
    let adopt = Request::Adopt {
        request: 1,
        session: "slow".into(),
        store: other.root().to_path_buf(),
        build: host.build,
        regions: vec![memory.as_region()],
        tracking: Tracking::Off,
    };
    let fds = [uffd.as_fd(), pidfd.as_fd(), states.as_fd()];
    control::send(host.control.as_fd(), &adopt, &fds).unwrap();
    for order in [
        Request::Replay {
            request: 2,
            session: "slow".into(),
        },
        Request::Load {
            request: 3,
            session: "slow".into(),
            bytes_per_second: 5,
        },
    ] {
        control::send(host.control.as_fd(), &order, &[]).unwrap();
    }
    let waiting = std::thread::spawn({
        let memory = memory.clone();
        move || assert_eq!(Some(memory.read(9 * PAGE)), content(9))
    });
    // Long enough to be refused, had opening it come to an end.
    std::thread::sleep(Duration::from_millis(50));
    let all = host.surrender();
    let [session] = &all[..] else {
        panic!("{} sessions", all.len())
    };
    let Report::Surrendered {
        replays,
        load_bytes_per_second,
        ..
    } = session.report
    else {
        unreachable!("nothing else is kept")
    };
    assert!(replays);
    assert_eq!(load_bytes_per_second, Some(5));
    assert!(!waiting.is_finished());
    std::fs::remove_file(&stuck).unwrap();
    std::fs::copy(here.join("manifest.json"), &stuck).unwrap();
    host.take_over(session);
    waiting.join().unwrap();
    for page in (0..PAGES).filter(|page| content(*page).is_some()) {
        assert_eq!(Some(memory.read(page * PAGE)), content(page));
    }
}
