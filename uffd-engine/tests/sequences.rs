//! The sequences of the kernel model (`src/kernel_model`), against the real kernel: threads
//! that touch, a thread that gives ranges back, in whatever order the scheduler makes of them.

mod support;

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use snapshot_format::{PageCount, PageIndex};
use support::{Guest, Host, PAGE, content, evict, has_uffd};
use uffd_engine::{PageState, PageStates};

const PAGES: u64 = 96;

/// What one thread does next.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read(u64),
    Write(u64),
    GiveBack(u64, u64),
}

fn script() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => (0..PAGES).prop_map(Step::Read),
        2 => (0..PAGES).prop_map(Step::Write),
        1 => (0..PAGES, 1..24u64).prop_map(|(page, pages)| Step::GiveBack(page, pages)),
    ];
    proptest::collection::vec(step, 1..60)
}

/// What every thread may know about a page.
#[derive(Default)]
struct Known {
    giving_back: AtomicBool,
    given_back: AtomicBool,
}

fn play(guest: &Guest, script: &[Step], known: &[Known]) {
    for step in script {
        match *step {
            Step::Read(page) | Step::Write(page) => {
                let before = known[page as usize].given_back.load(Ordering::SeqCst);
                let found = guest.memory.read(page * PAGE);
                if let Step::Write(_) = step {
                    // A word that no content has, where no check looks.
                    guest.memory.write(page * PAGE + 64, 1);
                }
                let after = known[page as usize].giving_back.load(Ordering::SeqCst);
                let stored = content(page).unwrap_or(0);
                let right = (found == 0 && after) || (found == stored && !before);
                assert!(
                    right,
                    "page {page}: {found:#x}, given back {before}, {after}"
                );
            }
            Step::GiveBack(page, pages) => {
                let range = page..(page + pages).min(PAGES);
                for page in range.clone() {
                    known[page as usize]
                        .giving_back
                        .store(true, Ordering::SeqCst);
                }
                let bytes = (range.end - range.start) * PAGE;
                guest.memory.give_back(range.start * PAGE, bytes).unwrap();
                for page in range {
                    known[page as usize]
                        .given_back
                        .store(true, Ordering::SeqCst);
                }
            }
        }
    }
}

#[test]
fn the_real_kernel_agrees_with_the_model() {
    if !has_uffd("the_real_kernel_agrees_with_the_model") {
        return;
    }
    let host = RefCell::new(Host::start(PAGES));
    let session = Cell::new(0);
    let scripts = (script(), script(), script(), any::<bool>());
    let config = ProptestConfig {
        cases: 150,
        failure_persistence: None,
        // A failed case depends on the scheduler: the same steps may pass.
        max_shrink_iters: 0,
        ..ProptestConfig::default()
    };
    proptest!(config, |((first, second, third, cold) in scripts)| {
        let host = &mut *host.borrow_mut();
        session.set(session.get() + 1);
        let name = format!("s{}", session.get());
        if cold {
            evict(&host.data_file());
        }
        let states = PageStates::create(PageCount::new(PAGES)).unwrap();
        let guest = host.attach(&name, &states);
        let known: Vec<Known> = (0..PAGES).map(|_| Known::default()).collect();
        std::thread::scope(|scope| {
            for script in [&first, &second, &third] {
                scope.spawn(|| play(&guest, script, &known));
            }
        });
        for page in 0..PAGES {
            let gone = known[page as usize].given_back.load(Ordering::SeqCst);
            let expected = if gone { 0 } else { content(page).unwrap_or(0) };
            assert_eq!(guest.memory.read(page * PAGE), expected, "page {page}, at the end");
        }
        // A thread goes on before the table is written; once detached, it is.
        host.detach(&name);
        for page in 0..PAGES {
            let state = states.get(PageIndex::new(page));
            assert!(state.is_installed() || state == PageState::Removed, "page {page}: {state:?}");
        }
        std::fs::remove_file(host.dir.path().join(format!("{name}.sock"))).unwrap();
    });
}
