//! Merging: the same memory, in one build; nothing of the source touched; resumed after a crash.

mod support;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use snapshot_format::{
    Build, BuildStore, ChainCost, Encoding, FormatError, Generation, MergeOptions, MergeOutcome,
    MergePolicy, MergeProgress, MergeReason, PageSize, verify,
};
use support::chain::{PAGES, mixed_chain, publish_chain};
use support::{PAGE, at, content, count, filled, id, info, large_chain, small_chain, temp_store};

/// As small as windows get: one chunk of 64 pages, and a checkpoint after each.
const SMALL: MergeOptions = MergeOptions {
    window_bytes: 1,
    checkpoint_bytes: 1,
    encoding: Encoding::Raw,
};

fn go_on(_: MergeProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn merge(store: &BuildStore, source: &Build, number: u8) -> (Build, MergeProgress) {
    merge_as(store, source, number, Encoding::Raw)
}

fn merge_as(
    store: &BuildStore,
    source: &Build,
    number: u8,
    encoding: Encoding,
) -> (Build, MergeProgress) {
    let options = MergeOptions { encoding, ..SMALL };
    let outcome = store.merge(source, id(number), info(), &options, &mut go_on);
    let MergeOutcome::Published(_, progress) = outcome.unwrap() else {
        panic!("nobody stopped it")
    };
    (store.open_cold(&id(number)).unwrap(), progress)
}

fn encoding() -> impl Strategy<Value = Encoding> {
    prop_oneof![
        2 => Just(Encoding::Raw),
        1 => Just(Encoding::Lz4),
        1 => Just(Encoding::Zstd),
    ]
}

/// Path, inode, time of change and content.
type FileState = (PathBuf, u64, (i64, i64), Vec<u8>);

/// Every file in a directory.
fn state(dir: &Path) -> Vec<FileState> {
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries
        .map(|path| {
            let metadata = fs::metadata(&path).unwrap();
            let changed = (metadata.ctime(), metadata.ctime_nsec());
            let content = fs::read(&path).unwrap();
            (path, metadata.ino(), changed, content)
        })
        .collect();
    files.sort();
    files
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn merged_chain_has_the_same_memory_in_one_build(
        chain in mixed_chain(),
        encoding in encoding(),
    ) {
        let (_dir, store) = temp_store();
        let (last, memory) = publish_chain(&store, &chain);
        let mut before = vec![0; PAGES * PAGE];
        last.read_range(at(0), &mut before).unwrap();
        let (merged, progress) = merge_as(&store, &last, 100, encoding);
        let mut after = vec![1; PAGES * PAGE];
        merged.read_range(at(0), &mut after).unwrap();
        prop_assert!(before == after);
        prop_assert_eq!(after, filled(&memory));

        let map = merged.map();
        prop_assert_eq!((map.generation(), map.parent()), (Generation::BASE, None));
        prop_assert_eq!(map.builds().len(), 1);
        let stored = memory.iter().filter(|&&byte| byte != 0).count() as u64;
        prop_assert_eq!(merged.data_files()[0].pages(), count(stored));
        prop_assert_eq!((progress.written, progress.total), (count(stored), count(stored)));
        let report = verify(&store, &id(100));
        prop_assert!(report.is_clean(), "{:?}", report.faults);
        // And without any of the builds it was made of.
        for number in (1..=chain.len()).rev() {
            store.remove(&id(u8::try_from(number).unwrap())).unwrap();
        }
        prop_assert_eq!(content(&store.open_cold(&id(100)).unwrap()), memory);
    }
}

#[test]
fn merge_touches_no_file_of_its_source_and_copies_the_others() {
    let (_dir, store) = temp_store();
    let source = large_chain(&store);
    let before: Vec<_> = (1..4).map(|n| state(&store.path(&id(n)))).collect();
    let (merged, _) = merge(&store, &source, 9);
    let after: Vec<_> = (1..4).map(|n| state(&store.path(&id(n)))).collect();
    assert!(before == after);
    assert_eq!(content(&merged), content(&source));
    let vmstate = fs::read(merged.dir().join("vmstate")).unwrap();
    assert_eq!(vmstate, b"state of build 3");
    assert_eq!(merged.manifest().labels, info().labels);
    assert_eq!(store.unfinished_merges().unwrap(), []);
    assert_eq!(fs::read_dir(store.root()).unwrap().count(), 4);
}

#[test]
fn copied_disk_keeps_its_holes() {
    let (_dir, store) = temp_store();
    let mut staging = store.stage(id(1)).unwrap();
    let writer = staging.memory_writer(None, PageSize::Size4K, count(4));
    writer.unwrap().finish().unwrap();
    let disk = fs::File::create(staging.file_path("rootfs.img")).unwrap();
    disk.set_len(1 << 30).unwrap();
    disk.write_all_at(b"disk", 500 << 20).unwrap();
    staging.add_file("rootfs.img").unwrap();
    staging.publish(info()).unwrap();
    let (merged, _) = merge(&store, &store.open(&id(1)).unwrap(), 9);
    let copy = fs::metadata(merged.dir().join("rootfs.img")).unwrap();
    assert_eq!(copy.len(), 1 << 30);
    assert!(copy.blocks() * 512 < 10 << 20, "{} blocks", copy.blocks());
    assert!(verify(&store, &id(9)).is_clean());
}

#[test]
fn rot_in_a_source_is_an_error_and_not_content() {
    let (_dir, store) = temp_store();
    let source = large_chain(&store);
    let path = store.path(&id(1)).join("memory.data");
    let data = fs::File::options().write(true).open(&path).unwrap();
    data.write_all_at(&[77], 600_000).unwrap();
    let error = store
        .merge(&source, id(9), info(), &SMALL, &mut go_on)
        .unwrap_err();
    let FormatError::Corrupt(fault) = &error else {
        panic!("{error}")
    };
    assert_eq!(
        (fault.file.as_path(), fault.offset),
        (path.as_path(), 512 << 10)
    );
    assert!(!store.contains(&id(9)));
}

#[test]
fn rot_in_a_copied_file_is_an_error() {
    let (_dir, store) = temp_store();
    let (_, source) = small_chain(&store);
    fs::write(source.dir().join("vmstate"), "state of build 3").unwrap();
    let error = store
        .merge(&source, id(9), info(), &SMALL, &mut go_on)
        .unwrap_err();
    assert!(matches!(error, FormatError::Corrupt(_)), "{error}");
    assert!(!store.contains(&id(9)));
}

#[test]
fn merge_into_an_id_that_is_taken_is_refused() {
    let (_dir, store) = temp_store();
    let (_, source) = small_chain(&store);
    let _staged = store.stage(id(9)).unwrap();
    for taken in [1, 2, 9] {
        let error = store
            .merge(&source, id(taken), info(), &SMALL, &mut go_on)
            .unwrap_err();
        assert!(
            matches!(error, FormatError::AlreadyExists { .. }),
            "{error}"
        );
    }
    assert!(store.root().join(format!(".staging-{}", id(9))).is_dir());
    assert_eq!(store.unfinished_merges().unwrap(), []);
}

#[test]
fn cost_of_a_chain_counts_dead_bytes_and_touched_chunks() {
    let (_dir, store) = temp_store();
    let source = large_chain(&store);
    let cost = ChainCost::of(&source).unwrap();
    assert_eq!(cost.depth, 3);
    // 300 pages, 107 diffs, 30 diffs: 437 pages are stored.
    assert!(cost.stored_bytes >= 437 * PAGE as u64, "{cost:?}");
    let zeros = content(&source).iter().filter(|&&byte| byte == 0).count() as u64;
    assert_eq!(cost.live_bytes, (320 - zeros) * PAGE as u64);
    assert_eq!(cost.dead_bytes(), cost.stored_bytes - cost.live_bytes);
    // Every chunk of all three, of which the last ones are shorter.
    assert_eq!(cost.touched_bytes, 437 * PAGE as u64);
    let (merged, _) = merge(&store, &source, 9);
    let cost = ChainCost::of(&merged).unwrap();
    assert_eq!(
        (cost.depth, cost.live_bytes),
        (1, (320 - zeros) * PAGE as u64)
    );
    assert!(cost.dead_bytes() < 64 << 10, "{cost:?}");
    let policy = MergePolicy {
        max_depth: 2,
        ..MergePolicy::default()
    };
    let reason = policy.judge(&ChainCost::of(&source).unwrap());
    assert_eq!(reason, Some(MergeReason::Depth { depth: 3, limit: 2 }));
    assert_eq!(policy.judge(&cost), None);
}
