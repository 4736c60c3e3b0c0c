//! Memory that a guest reports as free, as QEMU gives it back: a hole in the file, which nobody is
//! told of, and then a `madvise`, whose event the engine reads. Against the real kernel.
//!
//! A page that was there is zero from the hole on. One that was never asked for is zero once the
//! event was read; until then it may have the build's content, which is what the guest had left
//! there. Neither is ever another page's.

mod support;

use std::fs::File;

use snapshot_format::PageIndex;
use support::shared::{PAGES, Shared, give_back, start};
use support::{Guest, PAGE, content};
use uffd_engine::control::{Report, Request};
use uffd_engine::{PageState, Tracking};

/// Where a guest writes, beside what the build has in its pages.
const WRITTEN: u64 = 64;

fn load(shared: &mut Shared) {
    let load = |request| Request::Load {
        request,
        session: "s1".to_owned(),
        bytes_per_second: u64::MAX,
    };
    let (report, _) = shared.host.ask(load);
    assert!(matches!(report, Report::Stats { .. }), "{report:?}");
}

fn is_loaded(shared: &mut Shared) {
    let (report, _) = shared.host.report();
    assert!(matches!(report, Report::Loaded { .. }), "{report:?}");
}

fn replace_engine(shared: &mut Shared) {
    shared.host.replace_engine();
    let (guest, states) = (&shared.guest, &shared.states);
    shared
        .host
        .adopt_tracking("s1", guest, states, Tracking::Kernel);
}

/// Pauses it as a daemon does, with every page looked at that is said to be as in the build.
fn captures(shared: &mut Shared) {
    // A thread goes on before the table is written; an answer comes after that.
    let stats = shared.host.stats("s1");
    assert_eq!(stats.poisoned, 0, "{stats:?}");
    let unwritten = shared.unwritten();
    let (_, build) = shared.capture(Some(&unwritten), true).unwrap();
    shared.assert_is_the_memory(&build);
    let (_, compared) = shared.capture(None, false).unwrap();
    shared.assert_is_the_memory(&compared);
}

#[test]
fn a_hole_that_nobody_told_of_is_zero_where_a_page_was_and_the_builds_elsewhere() {
    const NAME: &str =
        "a_hole_that_nobody_told_of_is_zero_where_a_page_was_and_the_builds_elsewhere";
    for is_replaced in [false, true] {
        let Some(mut shared) = start(NAME) else {
            return;
        };
        for page in (0..128).chain(300..332) {
            shared.guest.check(page);
        }
        for page in [5, 40, 301] {
            shared.guest.memory.write(page * PAGE + WRITTEN, 7);
        }
        shared.host.stats("s1");
        let was_there = |page: &u64| shared.states.get(PageIndex::new(*page)).is_installed();
        let there: Vec<u64> = (0..PAGES).filter(was_there).collect();
        shared.punch(0, 256);
        shared.punch(300, 8);
        if is_replaced {
            replace_engine(&mut shared);
        }
        // Some are read, some are written at once, and some are left as they are.
        for page in (0..192).filter(|page| page % 8 != 0) {
            let expected = match content(page) {
                Some(word) if !there.contains(&page) => word,
                _ => 0,
            };
            if page % 3 == 0 {
                shared.guest.memory.write(page * PAGE + WRITTEN, page);
            }
            let word = |at| shared.guest.memory.read(page * PAGE + at);
            assert_eq!(word(0), expected, "start of page {page}");
            assert_eq!(word(4088), expected, "end of page {page}");
            let written = if page % 3 == 0 { page } else { 0 };
            assert_eq!(word(WRITTEN), written, "page {page}");
        }
        for page in 308..332 {
            let expected = content(page).unwrap_or(0);
            assert_eq!(shared.guest.memory.read(page * PAGE), expected);
        }
        captures(&mut shared);
    }
}

#[test]
fn what_was_given_back_is_not_loaded_again() {
    let Some(mut shared) = start("what_was_given_back_is_not_loaded_again") else {
        return;
    };
    for page in 100..120 {
        shared.guest.check(page);
    }
    // What was there, and what was not yet.
    shared.give_back(100, 100);
    load(&mut shared);
    is_loaded(&mut shared);
    let mut stored = (0..PAGES).filter(|page| content(*page).is_some());
    let expected = stored.clone().filter(|page| !(100..200).contains(page));
    let expected = expected.count() as u64;
    // Reads that the load has started may still be under way.
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while shared.present() < expected {
        assert!(std::time::Instant::now() < patience, "{}", shared.present());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    shared.host.stats("s1");
    assert_eq!(shared.present(), expected);
    let state = |page: u64| shared.states.get(PageIndex::new(page));
    assert!((100..200).all(|page| state(page) == PageState::Removed));
    assert!(stored.all(|page| (100..200).contains(&page) || state(page) == PageState::Clean));
    captures(&mut shared);
}

/// What one thread knows of a page that no other thread touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// Not asked for: the build's.
    Untouched,
    /// The build's or zero: it was given back before it was asked for.
    Either,
    Build,
    Zero,
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A guest's thread: it reads, writes and gives back pages of its own, and checks all it sees.
fn play(
    guest: &Guest,
    ram: &File,
    first: u64,
    pages: u64,
    random: &mut Random,
) -> Vec<(Known, u64)> {
    let memory = &guest.memory;
    let mut known = vec![(Known::Untouched, 0); pages as usize];
    for step in 1..1500 {
        let at = random.below(pages);
        let page = first + at;
        if random.below(10) == 0 {
            let end = (at + 1 + random.below(48)).min(pages);
            give_back(guest, ram, page, end - at);
            for (known, written) in &mut known[at as usize..end as usize] {
                *known = match known {
                    Known::Untouched | Known::Either => Known::Either,
                    Known::Build | Known::Zero => Known::Zero,
                };
                *written = 0;
            }
            continue;
        }
        let (known, written) = &mut known[at as usize];
        let stored = content(page).unwrap_or(0);
        let found = memory.read(page * PAGE);
        assert_eq!(found, memory.read(page * PAGE + 4088), "page {page}");
        let right = match known {
            Known::Untouched | Known::Build => found == stored,
            Known::Zero => found == 0,
            Known::Either => found == 0 || found == stored,
        };
        assert!(right, "page {page} is {found:#x}, and was {known:?}");
        *known = if found == stored && stored != 0 {
            Known::Build
        } else {
            Known::Zero
        };
        assert_eq!(memory.read(page * PAGE + WRITTEN), *written, "page {page}");
        if random.below(3) == 0 {
            *written = page << 32 | step;
            memory.write(page * PAGE + WRITTEN, *written);
        }
    }
    known
}

#[test]
fn pages_given_back_while_all_is_loaded_and_engines_change_are_never_wrong() {
    const NAME: &str = "pages_given_back_while_all_is_loaded_and_engines_change_are_never_wrong";
    const THREADS: u64 = 3;
    for round in 0..12 {
        let Some(mut shared) = start(NAME) else {
            return;
        };
        if round % 2 == 0 {
            support::evict(&shared.host.data_file());
        }
        load(&mut shared);
        let share = PAGES / THREADS;
        let seen: Vec<(Known, u64)> = std::thread::scope(|scope| {
            // Its own host, while its guest is played with.
            let Shared {
                host,
                guest,
                states,
                ram,
            } = &mut shared;
            let (guest, states, ram) = (&*guest, &*states, &*ram);
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ (round << 8 | thread) << 20);
                    scope.spawn(move || play(guest, ram, thread * share, share, &mut random))
                })
                .collect();
            host.replace_engine();
            host.adopt_tracking("s1", guest, states, Tracking::Kernel);
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        load(&mut shared);
        is_loaded(&mut shared);
        for (page, (known, written)) in (0..PAGES).zip(&seen) {
            let found = shared.guest.memory.read(page * PAGE);
            let stored = content(page).unwrap_or(0);
            let right = match known {
                Known::Untouched | Known::Build => found == stored,
                Known::Zero => found == 0,
                Known::Either => found == 0 || found == stored,
            };
            assert!(right, "page {page} is {found:#x}, and was {known:?}");
            let found = shared.guest.memory.read(page * PAGE + WRITTEN);
            assert_eq!(found, *written, "page {page}");
        }
        captures(&mut shared);
    }
}
