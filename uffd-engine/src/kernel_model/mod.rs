//! Sessions against a model of the kernel: every order of events, refusals for any stretch,
//! partial copies, pages that are there already, ranges given back while they are read, holes that
//! nobody is told of, engines that die between an install and the table, a VMM that vanishes.
//!
//! ```text
//!   steps (proptest) ──▶ Kernel: pages, waiting threads, queued events, madvise calls under way
//!                           ▲  │ events, EAGAIN, EEXIST, ESRCH, short copies
//!                     copy, │  ▼
//!                     wake  Session ──▶ reads in flight (completed in any order, or failed)
//! ```
//!
//! What has to hold, whatever the steps: a thread that gets a page reads the build's content if
//! the page was never given back, and zero if it was; when everything that was refused for now
//! is allowed again, nobody waits; the table never calls a page missing that was given back; and
//! where writes are tracked, no page that differs from the build passes for unwritten.

mod kernel;
mod run;

use proptest::prelude::*;

use run::{Run, Step};

const PAGES: u64 = 64;

fn step() -> impl Strategy<Value = Step> {
    let page = 0..PAGES;
    prop_oneof![
        6 => (page.clone(), any::<bool>()).prop_map(|(page, write)| Step::Touch { page, write }),
        2 => (page.clone(), 1..20u64).prop_map(|(page, pages)| Step::GiveBack { page, pages }),
        1 => (page, 1..20u64).prop_map(|(page, pages)| Step::Punch { page, pages }),
        1 => Just(Step::Die),
        2 => any::<u16>().prop_map(|which| Step::FinishGivingBack { which }),
        4 => (1..4usize).prop_map(|most| Step::Turn { most }),
        3 => Just(Step::RetryDue),
        4 => (any::<u16>(), 0..8u8).prop_map(|(which, how)| Step::FinishRead { which, fail: how == 0 }),
        1 => (0..6u32).prop_map(|times| Step::Refuse { times }),
        1 => (1..5u64).prop_map(|pages| Step::ShortCopies { pages }),
        1 => any::<bool>().prop_map(|resident| Step::PageCache { resident }),
        1 => any::<bool>().prop_map(|free| Step::Slots { free }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn no_fault_is_lost_and_no_content_is_wrong(
        steps in proptest::collection::vec(step(), 1..80),
        window in prop_oneof![Just(1u64), Just(4), Just(16)],
        tracks in any::<bool>(),
    ) {
        let mut run = if tracks { Run::tracking(window) } else { Run::new(window) };
        for step in steps {
            run.step(step);
        }
        run.settle();
        run.check();
    }

    #[test]
    fn a_vmm_that_vanishes_at_any_time_ends_in_quiet(
        steps in proptest::collection::vec(step(), 1..40),
        at in 0..40usize,
    ) {
        let mut run = Run::new(16);
        for (index, step) in steps.into_iter().enumerate() {
            if index == at {
                run.kill_vmm();
            }
            run.step(step);
        }
        run.kill_vmm();
        run.settle_dead();
    }
}

#[test]
fn an_engine_that_dies_over_a_hole_leaves_no_zeros_that_pass_for_the_build() {
    let mut run = Run::tracking(1);
    let read = Step::Touch {
        page: 8,
        write: false,
    };
    run.step(read);
    run.step(Step::Turn { most: 1 });
    run.step(Step::Punch { page: 8, pages: 1 });
    run.step(read);
    // With the zeros there, and the table not written.
    run.step(Step::Die);
    run.step(Step::Turn { most: 1 });
    run.settle();
    run.check();
}

#[test]
fn the_model_itself_notices_a_session_that_brings_old_content_back() {
    // The check is worth something only if it can fail: a table that forgets what was given back.
    let broken = std::panic::catch_unwind(|| {
        let mut run = Run::new(1);
        run.step(Step::Touch {
            page: 5,
            write: false,
        });
        run.step(Step::Turn { most: 1 });
        run.step(Step::GiveBack { page: 5, pages: 1 });
        run.step(Step::Turn { most: 1 });
        run.step(Step::FinishGivingBack { which: 0 });
        run.forget_what_was_given_back();
        run.step(Step::Touch {
            page: 5,
            write: false,
        });
        run.settle();
        run.check();
    });
    assert!(broken.is_err());
}
