//! What an engine does ahead of faults, against the real kernel: recording, replay, loading.

mod support;

use std::os::fd::AsFd;

use snapshot_format::{PageCount, PageIndex, WorkingSetFile};
use support::{Guest, Host, PAGE, content, evict, has_uffd};
use uffd_engine::control::{self, Report, Request};
use uffd_engine::{PageState, PageStates, SessionStats, Tracking, recording};

const PAGES: u64 = 2048;

fn table() -> PageStates {
    PageStates::create(PageCount::new(PAGES)).unwrap()
}

fn order(
    host: &mut Host,
    request: impl FnOnce(u64, String) -> Request,
    session: &str,
) -> SessionStats {
    match host.ask(|number| request(number, session.to_owned())).0 {
        Report::Stats { stats, .. } => stats,
        other => panic!("{other:?}"),
    }
}

fn record(host: &mut Host, session: &str) {
    let make = |request, session| Request::Record {
        request,
        session,
        window_ms: 60_000,
        max_pages: 1000,
    };
    order(host, make, session);
}

/// Ends a recording and keeps it beside the build; how many pages the set has then.
fn keep(host: &mut Host, session: &str) -> u64 {
    let (report, fds) = host.ask(|request| Request::EndRecording {
        request,
        session: session.to_owned(),
    });
    let Report::Recorded { pages, session: of } = report else {
        panic!("{report:?}")
    };
    assert_eq!(of, session);
    assert!(matches!(host.report().0, Report::Stats { .. }));
    let touches = recording::from_memfd(fds.into_iter().next().unwrap()).unwrap();
    assert_eq!(touches.len() as u64, pages);
    recording::keep(&host.store, host.build, &touches)
        .unwrap()
        .get()
}

fn replay(host: &mut Host, session: &str) {
    order(
        host,
        |request, session| Request::Replay { request, session },
        session,
    );
}

/// Asks until something is so; what is waited for has no other sign.
fn wait_for(
    host: &mut Host,
    session: &str,
    what: &str,
    is_so: impl Fn(&SessionStats) -> bool,
) -> SessionStats {
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let stats = host.stats(session);
        if is_so(&stats) {
            return stats;
        }
        assert!(std::time::Instant::now() < patience, "{what}: {stats:?}");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

fn touch(guest: &Guest, pages: impl Iterator<Item = u64>) {
    pages.for_each(|page| guest.check(page));
}

#[test]
fn what_was_recorded_is_there_before_it_is_asked_for() {
    if !has_uffd("what_was_recorded_is_there_before_it_is_asked_for") {
        return;
    }
    let mut host = Host::start(PAGES);
    // Two restores that touch 300 pages each, 200 of them the same.
    for (session, from) in [("r1", 500), ("r2", 600)] {
        let states = table();
        let guest = host.attach(session, &states);
        record(&mut host, session);
        touch(&guest, (from..from + 300).rev());
        let faults = host.stats(session).faults;
        assert_eq!(faults, 300, "neighbours were installed along");
        let kept = keep(&mut host, session);
        assert_eq!(kept, if session == "r1" { 300 } else { 200 });
        host.detach(session);
    }
    for cold in [false, true] {
        if cold {
            evict(&host.data_file());
        }
        let (states, session) = (table(), if cold { "cold" } else { "warm" });
        let guest = host.attach(session, &states);
        replay(&mut host, session);
        // One page in 128 is left out.
        let stats = wait_for(&mut host, session, "replay", |stats| {
            stats.pages_replayed == 199
        });
        assert_eq!(stats.faults, 0, "{stats:?}");
        touch(&guest, 600..800);
        let stats = host.detach(session);
        assert_eq!(stats.faults, 1, "{stats:?}");
        assert_eq!(
            (stats.replay_hits, stats.replay_waste),
            (199, 0),
            "{stats:?}"
        );
        assert!(!stats.replay_stopped_early);
    }
}

#[test]
fn a_wrong_set_is_given_up() {
    if !has_uffd("a_wrong_set_is_given_up") {
        return;
    }
    let mut host = Host::start(PAGES);
    let touches: Vec<PageIndex> = (1000..PAGES).map(PageIndex::new).collect();
    recording::keep(&host.store, host.build, &touches).unwrap();
    let states = table();
    let guest = host.attach("s1", &states);
    std::thread::scope(|scope| {
        scope.spawn(|| touch(&guest, (0..1000).step_by(16)));
        replay(&mut host, "s1");
    });
    touch(&guest, (8..1000).step_by(16));
    let stats = host.stats("s1");
    let finished = stats.pages_replayed >= 1048 - 1048 / 128;
    assert!(stats.replay_stopped_early || finished, "{stats:?}");
    touch(&guest, 0..PAGES);
}

#[test]
fn without_a_working_set_nothing_is_replayed() {
    if !has_uffd("without_a_working_set_nothing_is_replayed") {
        return;
    }
    let mut host = Host::start(PAGES);
    let build = host.store.open(&host.build).unwrap();
    assert!(matches!(build.working_set(), WorkingSetFile::Missing));
    let states = table();
    let guest = host.attach("s1", &states);
    replay(&mut host, "s1");
    touch(&guest, 0..64);
    assert_eq!(host.detach("s1").pages_replayed, 0);
}

fn load(host: &mut Host, session: &str, bytes_per_second: u64) {
    let make = |request, session| Request::Load {
        request,
        session,
        bytes_per_second,
    };
    order(host, make, session);
}

#[test]
fn all_memory_is_loaded_but_what_is_zero_or_was_given_back() {
    if !has_uffd("all_memory_is_loaded_but_what_is_zero_or_was_given_back") {
        return;
    }
    let mut host = Host::start(PAGES);
    evict(&host.data_file());
    let states = table();
    let guest = host.attach("s1", &states);
    guest.memory.give_back(100 * PAGE, 50 * PAGE).unwrap();
    guest.memory.write(200 * PAGE + 8, 77);
    load(&mut host, "s1", u64::MAX);
    let stored = (0..PAGES).filter(|page| content(*page).is_some());
    let expected = stored.filter(|page| !(100..150).contains(page)).count() as u64;
    let (report, _) = host.report();
    let Report::Loaded { pages, .. } = report else {
        panic!("{report:?}")
    };
    assert_eq!(pages + 1, expected, "one was there before");
    // Reads that the load has started may still be under way.
    let done = |stats: &SessionStats| stats.pages_installed - stats.pages_zeroed == expected;
    let stats = wait_for(&mut host, "s1", "load", done);
    assert_eq!(stats.faults, 1, "{stats:?}");
    for page in 0..PAGES {
        let state = states.get(PageIndex::new(page));
        let expected = match content(page) {
            _ if (100..150).contains(&page) => PageState::Removed,
            Some(_) => PageState::Clean,
            None => PageState::Missing,
        };
        assert_eq!(state, expected, "page {page}");
    }
    assert_eq!(
        guest.memory.read(200 * PAGE + 8),
        77,
        "what the guest wrote"
    );
    assert_eq!(guest.memory.read(120 * PAGE), 0);
    touch(&guest, 150..PAGES);
}

#[test]
fn a_load_that_is_ended_half_way_leaves_an_exact_table() {
    if !has_uffd("a_load_that_is_ended_half_way_leaves_an_exact_table") {
        return;
    }
    let mut host = Host::start(PAGES);
    let states = table();
    let guest = host.attach("s1", &states);
    // A fifth of the memory in a second, in whatever part of it passes.
    load(&mut host, "s1", PAGES * PAGE / 5);
    wait_for(&mut host, "s1", "load", |stats| stats.pages_loaded > 0);
    let stats = order(
        &mut host,
        |request, session| Request::Halt { request, session },
        "s1",
    );
    assert!(stats.pages_installed < PAGES / 2, "{stats:?}");
    let stats = host.detach("s1");
    let clean = |page: &u64| states.get(PageIndex::new(*page)) == PageState::Clean;
    assert_eq!(
        (0..PAGES).filter(clean).count() as u64,
        stats.pages_installed
    );
    let others = (0..PAGES).filter(|page| !clean(page));
    for page in others {
        assert_eq!(
            states.get(PageIndex::new(page)),
            PageState::Missing,
            "page {page}"
        );
    }
    drop(guest);
}

#[test]
fn a_recording_comes_by_itself_when_its_time_is_over() {
    if !has_uffd("a_recording_comes_by_itself_when_its_time_is_over") {
        return;
    }
    let mut host = Host::start(PAGES);
    let states = table();
    let guest = host.attach("s1", &states);
    let make = |request, session| Request::Record {
        request,
        session,
        window_ms: 20,
        max_pages: 1000,
    };
    order(&mut host, make, "s1");
    touch(&guest, [7, 300, 5].into_iter());
    let (report, fds) = host.report();
    assert!(matches!(report, Report::Recorded { .. }), "{report:?}");
    let touches = recording::from_memfd(fds.into_iter().next().unwrap()).unwrap();
    assert_eq!(touches[0].get(), 7);
    // Neighbours are installed along again.
    touch(&guest, 1000..1064);
    assert!(host.stats("s1").faults < 3 + 64);
}

#[test]
fn a_successor_goes_on_loading_when_it_is_told_at_once() {
    if !has_uffd("a_successor_goes_on_loading_when_it_is_told_at_once") {
        return;
    }
    let mut host = Host::start(PAGES);
    let states = table();
    let guest = host.attach("s1", &states);
    // Too slow to get anywhere near the end.
    load(&mut host, "s1", PAGES / 4 * PAGE / 60);
    touch(&guest, 0..10);
    host.replace_engine();
    // As a daemon does: it doesn't wait for the adoption, which may wait for the build.
    host.send_adopt("s1", &guest, &states, Tracking::Off);
    let load = Request::Load {
        request: 4712,
        session: "s1".to_owned(),
        bytes_per_second: u64::MAX,
    };
    control::send(host.control.as_fd(), &load, &[]).unwrap();
    assert!(matches!(host.report().0, Report::Attached { .. }));
    assert!(matches!(
        host.report().0,
        Report::Stats { request: 4712, .. }
    ));
    match host.report().0 {
        Report::Loaded { session, pages } => {
            assert_eq!(session, "s1");
            let stored = (0..PAGES).filter(|page| content(*page).is_some()).count() as u64;
            assert!(pages > 0 && pages < stored, "{pages} of {stored}");
        }
        other => panic!("expected the end of the load, got {other:?}"),
    }
    touch(&guest, 0..PAGES);
}
