//! Random chains of generations against the dumbest model there is: an array of pages.

mod support;

use proptest::prelude::*;
use snapshot_format::{Build, BuildStore, Inspection, verify_with};
use support::chain::{PAGES, apply, chain, publish_adopted, write};
use support::{PAGE, at, content, count, filled, publish, temp_store};

/// Everything that must hold for a build with this memory.
fn check(store: &BuildStore, build: &Build, memory: &[u8]) {
    assert_eq!(content(build), memory);
    let mut all = vec![0; PAGES * PAGE];
    build.read_range(at(0), &mut all).unwrap();
    assert_eq!(all, filled(memory));

    // A dumb walk over the extents agrees with every lookup and every clipped range.
    let map = build.map();
    let extents: Vec<_> = map.all_extents().collect();
    let mut next = at(0);
    for extent in &extents {
        assert_eq!(extent.start, next);
        next = extent.end();
    }
    assert_eq!(next, at(PAGES as u64));
    for page in 0..PAGES as u64 {
        let covering = extents
            .iter()
            .find(|e| e.start <= at(page) && at(page) < e.end());
        assert_eq!(map.lookup(at(page)), covering.copied());
        for end in page..=PAGES as u64 + 1 {
            let range = at(page)..at(end);
            let clipped: Vec<_> = extents.iter().filter_map(|e| e.clip(&range)).collect();
            assert_eq!(map.extents(range).collect::<Vec<_>>(), clipped);
        }
    }
    assert_eq!(map.lookup(at(PAGES as u64)), None);

    let options = snapshot_format::VerifyOptions { ancestors: true };
    let report = verify_with(store, &build.id(), options, &mut |_| {});
    assert!(report.is_clean(), "{:?}", report.faults);
    let inspection = Inspection::of(build).unwrap();
    let counted = inspection.zero_pages + inspection.own_pages + inspection.inherited_pages;
    assert_eq!(counted, count(PAGES as u64));
    let zeros = memory.iter().filter(|&&byte| byte == 0).count() as u64;
    assert_eq!(inspection.zero_pages, count(zeros));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn chain_of_generations_reads_like_an_array_of_pages(chain in chain()) {
        let (_dir, store) = temp_store();
        let mut memory = vec![0; PAGES];
        let mut parent: Option<Build> = None;
        for (number, ops) in (1..).zip(&chain) {
            let (build, summary) = publish(&store, number, parent.as_ref(), PAGES as u64, |writer| {
                write(writer, &memory, ops);
            });
            let after = apply(&memory, ops);
            check(&store, &build, &after);
            let changed = |to_zero: bool| {
                let pairs = memory.iter().zip(&after);
                count(pairs.filter(|(old, new)| old != new && (**new == 0) == to_zero).count() as u64)
            };
            prop_assert_eq!(summary.stored_pages, changed(false));
            prop_assert_eq!(summary.zero_pages_changed, changed(true));
            prop_assert_eq!(build.data_files().last().unwrap().pages(), changed(false));
            memory = after;
            parent = Some(build);
        }
    }

    #[test]
    fn chain_of_adopted_sparse_files_reads_like_an_array_of_pages(chain in chain()) {
        let (_dir, store) = temp_store();
        let mut memory = vec![0; PAGES];
        let mut parent: Option<Build> = None;
        for (number, ops) in (1..).zip(&chain) {
            let build = publish_adopted(&store, number, parent.as_ref(), &memory, ops);
            memory = apply(&memory, ops);
            check(&store, &build, &memory);
            parent = Some(build);
        }
    }
}
