//! Random chains of generations, and the dumbest model of them: one byte per page.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;
use snapshot_format::{Build, BuildStore, MemoryWriter, PageSize};

use super::{PAGE, at, count, filled, id, info, publish};

pub(crate) const PAGES: usize = 40;

/// What a generation does to a page.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Leave,
    /// Handed over with this content; 0 is a zero page.
    Write(u8),
    /// Handed over with the content it has.
    Rewrite,
    /// Declared zero.
    Zero,
}

/// One generation: what it does to each page, and who writes its data.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) ops: Vec<Op>,
    /// A sparse file that a VMM wrote, adopted; else packed by the writer.
    pub(crate) adopted: bool,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => Just(Op::Leave),
        3 => (0u8..4).prop_map(Op::Write),
        1 => Just(Op::Rewrite),
        1 => Just(Op::Zero),
    ]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(op(), PAGES)
}

/// Up to six generations, all written one way.
pub(crate) fn chain() -> impl Strategy<Value = Vec<Vec<Op>>> {
    prop::collection::vec(ops(), 1..7)
}

/// Up to six generations, some packed and some adopted.
pub(crate) fn mixed_chain() -> impl Strategy<Value = Vec<Step>> {
    let step = (ops(), any::<bool>()).prop_map(|(ops, adopted)| Step { ops, adopted });
    prop::collection::vec(step, 1..7)
}

/// The memory after a generation.
pub(crate) fn apply(memory: &[u8], ops: &[Op]) -> Vec<u8> {
    let page = |(&old, op): (&u8, &Op)| match op {
        Op::Leave | Op::Rewrite => old,
        Op::Write(byte) => *byte,
        Op::Zero => 0,
    };
    memory.iter().zip(ops).map(page).collect()
}

/// Hands the ops to a writer; runs of pages that are written go in one call.
pub(crate) fn write(writer: &mut MemoryWriter, old: &[u8], ops: &[Op]) {
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

/// What a VMM writes for a generation: data where pages changed, holes elsewhere.
pub(crate) fn sparse_file(path: &Path, old: &[u8], ops: &[Op]) {
    let file = File::create(path).unwrap();
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

/// Publishes a generation whose data is adopted.
pub(crate) fn publish_adopted(
    store: &BuildStore,
    number: u8,
    parent: Option<&Build>,
    old: &[u8],
    ops: &[Op],
) -> Build {
    let staging = store.stage(id(number)).unwrap();
    sparse_file(&staging.file_path("memory.data"), old, ops);
    let pages = count(PAGES as u64);
    MemoryWriter::adopt_sparse(&staging, parent, PageSize::Size4K, pages).unwrap();
    staging.publish(info()).unwrap();
    store.open(&id(number)).unwrap()
}

/// Publishes a whole chain as builds 1, 2, …: the last one, and the memory it has.
pub(crate) fn publish_chain(store: &BuildStore, chain: &[Step]) -> (Build, Vec<u8>) {
    let mut memory = vec![0; PAGES];
    let mut parent: Option<Build> = None;
    for (number, Step { ops, adopted }) in (1..).zip(chain) {
        let build = if *adopted {
            publish_adopted(store, number, parent.as_ref(), &memory, ops)
        } else {
            let pages = PAGES as u64;
            publish(store, number, parent.as_ref(), pages, |writer| {
                write(writer, &memory, ops);
            })
            .0
        };
        memory = apply(&memory, ops);
        parent = Some(build);
    }
    (parent.expect("a chain has a generation"), memory)
}
