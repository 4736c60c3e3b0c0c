//! Comparing builds: the same answer as comparing arrays of pages.

mod support;

use proptest::prelude::*;
use snapshot_format::{Difference, FormatError, PageRun};
use support::chain::{apply, chain, mixed_chain, publish_chain, write};
use support::{at, count, filled, publish, temp_store};

const PAGES: usize = support::chain::PAGES;

fn between(from: &snapshot_format::Build, to: &snapshot_format::Build) -> Difference {
    let mut last = None;
    let found = Difference::between(from, to, &mut |step| last = Some(step)).unwrap();
    let step = last.expect("progress was shown");
    assert_eq!(step.done, step.total);
    found
}

/// Compares the answer with the arrays.
fn check(found: &Difference, old: &[u8], new: &[u8]) {
    let pairs = || old.iter().zip(new);
    let counted = |of: &dyn Fn(u8, u8) -> bool| {
        count(pairs().filter(|(old, new)| of(**old, **new)).count() as u64)
    };
    assert_eq!(found.changed_pages, counted(&|old, new| old != new));
    assert_eq!(
        found.became_zero_pages,
        counted(&|old, new| old != new && new == 0)
    );
    assert_eq!(
        found.became_content_pages,
        counted(&|old, new| old != new && old == 0)
    );
    let same = found.shared_pages + found.equal_pages;
    assert_eq!(same, counted(&|old, new| old == new));
    let mut by_run = vec![false; old.len()];
    for PageRun { start, pages } in &found.changed_runs {
        let start = usize::try_from(start.get()).unwrap();
        let end = start + usize::try_from(pages.get()).unwrap();
        // Runs are as long as they can be.
        assert!(start == 0 || !by_run[start - 1]);
        by_run[start..end].fill(true);
    }
    let by_page: Vec<bool> = pairs().map(|(old, new)| old != new).collect();
    assert_eq!(by_run, by_page);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 32,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn generations_of_a_chain_differ_by_what_was_written(chain in chain()) {
        let (_dir, store) = temp_store();
        let mut builds = Vec::new();
        let mut memory = vec![0; PAGES];
        for (number, ops) in (1..).zip(&chain) {
            let parent = builds.last().map(|(build, _)| build);
            let (build, _) = publish(&store, number, parent, PAGES as u64, |writer| {
                write(writer, &memory, ops);
            });
            memory = apply(&memory, ops);
            builds.push((build, memory.clone()));
        }
        for (from, old) in &builds {
            for (to, new) in &builds {
                let found = between(from, to);
                check(&found, old, new);
                // Nothing of a chain is stored twice unless it was changed there and back.
                if from.id() == to.id() {
                    prop_assert_eq!(found.shared_pages, count(PAGES as u64));
                    prop_assert!(found.is_none());
                }
            }
        }
    }

    #[test]
    fn builds_of_unrelated_stores_are_compared_by_content(a in mixed_chain(), b in mixed_chain()) {
        let ((_dir, one), (_other_dir, other)) = (temp_store(), temp_store());
        let (from, old) = publish_chain(&one, &a);
        let (to, new) = publish_chain(&other, &b);
        check(&between(&from, &to), &old, &new);
    }
}

#[test]
fn another_vmstate_is_a_difference_and_another_size_is_refused() {
    let (_dir, store) = temp_store();
    let all = |writer: &mut snapshot_format::MemoryWriter| {
        writer.pages(at(0), &filled(&[1, 2, 3])).unwrap();
    };
    let (one, _) = publish(&store, 1, None, 4, all);
    let (two, _) = publish(&store, 2, None, 4, all);
    let found = between(&one, &two);
    assert_eq!(
        (found.equal_pages, found.shared_pages),
        (count(3), count(1))
    );
    assert_eq!(found.changed_files, ["vmstate"]);
    assert!(!found.is_none());

    let (small, _) = publish(&store, 3, None, 3, all);
    let refused = Difference::between(&one, &small, &mut |_| {});
    assert!(
        matches!(refused, Err(FormatError::ParentGeometry { .. })),
        "{refused:?}"
    );
}
