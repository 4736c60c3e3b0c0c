//! Random chains of generations against the dumbest model there is: an array of pages.

mod support;

use proptest::prelude::*;
use snapshot_format::{Build, BuildStore, Inspection, MemoryWriter, PageSize, verify_with};
use support::{PAGE, at, content, count, filled, id, info, publish, temp_store};

const PAGES: usize = 40;

/// What a generation does to a page.
#[derive(Clone, Copy, Debug)]
enum Op {
    Leave,
    /// Handed over with this content; 0 is a zero page.
    Write(u8),
    /// Handed over with the content it has.
    Rewrite,
    /// Declared zero.
    Zero,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => Just(Op::Leave),
        3 => (0u8..4).prop_map(Op::Write),
        1 => Just(Op::Rewrite),
        1 => Just(Op::Zero),
    ]
}

fn chain() -> impl Strategy<Value = Vec<Vec<Op>>> {
    prop::collection::vec(prop::collection::vec(op(), PAGES), 1..7)
}

/// The memory after a generation.
fn apply(memory: &[u8], ops: &[Op]) -> Vec<u8> {
    let page = |(&old, op): (&u8, &Op)| match op {
        Op::Leave | Op::Rewrite => old,
        Op::Write(byte) => *byte,
        Op::Zero => 0,
    };
    memory.iter().zip(ops).map(page).collect()
}

/// Hands the ops to a writer; runs of pages that are written go in one call.
fn write(writer: &mut MemoryWriter, old: &[u8], ops: &[Op]) {
    let mut run = Vec::new();
    for (page, op) in (0..).zip(ops) {
        let written = match op {
            Op::Write(byte) => Some(*byte),
            Op::Rewrite => Some(old[usize::try_from(page).unwrap()]),
            Op::Leave | Op::Zero => None,
        };
        match written {
            Some(byte) => run.push(byte),
            None if run.is_empty() => {}
            None => {
                writer
                    .pages(at(page - run.len() as u64), &filled(&run))
                    .unwrap();
                run.clear();
            }
        }
        if matches!(op, Op::Zero) {
            writer.zero(at(page), count(1)).unwrap();
        }
    }
    if !run.is_empty() {
        writer
            .pages(at((PAGES - run.len()) as u64), &filled(&run))
            .unwrap();
    }
}

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
    let inspection = Inspection::of(build);
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
            let staging = store.stage(id(number)).unwrap();
            sparse_file(&staging.file_path("memory.data"), &memory, ops);
            let pages = count(PAGES as u64);
            MemoryWriter::adopt_sparse(&staging, parent.as_ref(), PageSize::Size4K, pages).unwrap();
            staging.publish(info()).unwrap();
            memory = apply(&memory, ops);
            let build = store.open(&id(number)).unwrap();
            check(&store, &build, &memory);
            parent = Some(build);
        }
    }
}

/// What a VMM writes for a generation: data where pages changed, holes elsewhere.
fn sparse_file(path: &std::path::Path, old: &[u8], ops: &[Op]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len((PAGES * PAGE) as u64).unwrap();
    for ((page, &old), op) in (0u64..).zip(old).zip(ops) {
        let byte = match op {
            Op::Leave => continue,
            Op::Write(byte) => *byte,
            Op::Rewrite => old,
            Op::Zero => 0,
        };
        file.write_all_at(&[byte; PAGE], page * PAGE as u64)
            .unwrap();
    }
}
