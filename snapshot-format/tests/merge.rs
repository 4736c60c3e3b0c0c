//! Merging: the same memory, in one build; nothing of the source touched; resumed after a crash.

mod support;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use snapshot_format::{
    Build, BuildStore, ChainCost, FormatError, Generation, MergeOptions, MergeOutcome, MergePolicy,
    MergeProgress, MergeReason, Origin, PageSize, verify,
};
use support::chain::{PAGES, mixed_chain, publish_chain};
use support::crashing::Crashing;
use support::{PAGE, at, content, count, filled, id, info, publish, small_chain, temp_store};
use tempfile::TempDir;

/// As small as windows get: one chunk of 64 pages, and a checkpoint after each.
const SMALL: MergeOptions = MergeOptions {
    window_bytes: 1,
    checkpoint_bytes: 1,
};

fn go_on(_: MergeProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn merge(store: &BuildStore, source: &Build, number: u8) -> (Build, MergeProgress) {
    let outcome = store.merge(source, id(number), info(), &SMALL, &mut go_on);
    let MergeOutcome::Published(_, progress) = outcome.unwrap() else {
        panic!("nobody stopped it")
    };
    (store.open(&id(number)).unwrap(), progress)
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

/// A base of 300 pages and two diffs over it: five chunks of content.
fn large_chain(store: &BuildStore) -> Build {
    let (base, _) = publish(store, 1, None, 320, |writer| {
        let bytes: Vec<u8> = (0..300u16).map(|page| (page % 7) as u8 + 1).collect();
        writer.pages(at(10), &filled(&bytes)).unwrap();
    });
    let (diff, _) = publish(store, 2, Some(&base), 320, |writer| {
        for page in (0..320).step_by(3) {
            writer.pages(at(page), &filled(&[100])).unwrap();
        }
    });
    let (last, _) = publish(store, 3, Some(&diff), 320, |writer| {
        writer.zero(at(50), count(20)).unwrap();
        writer.pages(at(200), &filled(&[200; 30])).unwrap();
    });
    last
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn merged_chain_has_the_same_memory_in_one_build(chain in mixed_chain()) {
        let (_dir, store) = temp_store();
        let (last, memory) = publish_chain(&store, &chain);
        let mut before = vec![0; PAGES * PAGE];
        last.read_range(at(0), &mut before).unwrap();
        let (merged, progress) = merge(&store, &last, 100);
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
        prop_assert_eq!(content(&store.open(&id(100)).unwrap()), memory);
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
fn stopped_merge_goes_on_from_its_last_checkpoint() {
    let (_dir, store) = temp_store();
    let source = large_chain(&store);
    let mut calls = 0;
    let mut stop_at_3 = |progress: MergeProgress| {
        calls += 1;
        assert_eq!(progress.written, count(calls * 64));
        if calls == 3 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let outcome = store.merge(&source, id(9), info(), &SMALL, &mut stop_at_3);
    let MergeOutcome::Stopped(stopped) = outcome.unwrap() else {
        panic!("it was stopped")
    };
    assert_eq!((stopped.written, stopped.resumed), (count(192), count(0)));
    assert!(!store.contains(&id(9)));
    assert_eq!(store.unfinished_merges().unwrap(), [(id(9), Some(id(3)))]);
    // What removes leftovers leaves it alone.
    assert_eq!(store.remove_staging().unwrap().len(), 0);
    let (merged, progress) = merge(&store, &source, 9);
    assert_eq!(progress.resumed, count(192));
    assert!(progress.bytes_read < stopped.bytes_read);
    assert_eq!(content(&merged), content(&source));
    assert!(verify(&store, &id(9)).is_clean());
}

fn stopped_after_3_windows() -> (TempDir, BuildStore, Build) {
    let (dir, store) = temp_store();
    let source = large_chain(&store);
    let mut calls = 0;
    let mut stop = |_| {
        calls += 1;
        if calls == 3 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let outcome = store.merge(&source, id(9), info(), &SMALL, &mut stop);
    assert!(matches!(outcome, Ok(MergeOutcome::Stopped(_))));
    (dir, store, source)
}

#[test]
fn damaged_part_of_a_stopped_merge_is_written_again() {
    let (_dir, store, source) = stopped_after_3_windows();
    let staged = store.root().join(format!(".staging-{}", id(9)));
    let data = fs::File::options()
        .write(true)
        .open(staged.join("memory.data"));
    data.unwrap().write_all_at(b"rot", 300_000).unwrap();
    let (merged, progress) = merge(&store, &source, 9);
    assert_eq!(
        progress.resumed,
        count(64),
        "the chunk before the damaged one"
    );
    assert_eq!(content(&merged), content(&source));
    assert!(verify(&store, &id(9)).is_clean());
}

#[test]
fn merge_of_another_source_does_not_go_on_with_it() {
    let (_dir, store, source) = stopped_after_3_windows();
    let other = store.open(&id(2)).unwrap();
    assert_ne!(content(&other), content(&source));
    let (merged, progress) = merge(&store, &other, 9);
    assert_eq!(progress.resumed, count(0));
    assert_eq!(content(&merged), content(&other));
}

#[test]
fn abandoned_merge_leaves_nothing() {
    let (_dir, store, _) = stopped_after_3_windows();
    store.abandon_merge(&id(9)).unwrap();
    assert_eq!(fs::read_dir(store.root()).unwrap().count(), 3);
    let error = store.abandon_merge(&id(9)).unwrap_err();
    assert!(matches!(error, FormatError::NotFound { .. }), "{error}");
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

/// After a crash at any step, the source is whole, the merged build is absent or whole, and
/// merging again succeeds.
#[test]
fn crash_at_any_step_of_a_merge_can_be_gone_on_from() {
    for loses in [true, false] {
        let mut resumed = 0;
        let mut step = 0;
        loop {
            let (_dir, store) = temp_store();
            let source = large_chain(&store);
            let crashing = Crashing::after(store.root(), step, false);
            let broken = BuildStore::with_storage(store.root(), crashing.clone()).unwrap();
            let result = broken.merge(&source, id(9), info(), &SMALL, &mut go_on);
            assert_eq!(result.is_ok(), crashing.survived(), "step {step}");
            if loses {
                crashing.lose_unsynced();
            }
            store.remove_staging().unwrap();
            if store.contains(&id(9)) {
                assert!(verify(&store, &id(9)).is_clean(), "step {step}");
            }
            if result.is_ok() {
                assert!(store.contains(&id(9)), "what was acknowledged is durable");
                break;
            }
            let again = store.merge(&source, id(9), info(), &SMALL, &mut go_on);
            match again {
                Ok(MergeOutcome::Published(_, progress)) => {
                    resumed += usize::from(!progress.resumed.is_zero());
                }
                // Published, and the journal already gone.
                Err(FormatError::AlreadyExists { .. }) if store.contains(&id(9)) => {}
                other => panic!("step {step}: {other:?}"),
            }
            let merged = store.open(&id(9)).unwrap();
            assert_eq!(content(&merged), content(&source), "step {step}");
            assert!(verify(&store, &id(9)).is_clean(), "step {step}");
            assert!(verify(&store, &id(3)).is_clean(), "step {step}");
            assert_eq!(store.leftovers().unwrap().len(), 0, "step {step}");
            assert_eq!(store.unfinished_merges().unwrap(), [], "step {step}");
            step += 1;
        }
        assert!(step > 30, "the storage saw every step");
        assert!(
            resumed > 15,
            "most crashes were behind a checkpoint: {resumed}"
        );
    }
}

#[test]
fn huge_pages_are_merged_and_resumed_by_whole_pages() {
    const HUGE: usize = 2 << 20;
    let (_dir, store) = temp_store();
    let write = |number: u8, parent: Option<&Build>, start: u64, bytes: &[u8]| {
        let staging = store.stage(id(number)).unwrap();
        let writer = staging.memory_writer(parent, PageSize::Size2M, count(4));
        let mut writer = writer.unwrap();
        let pages: Vec<u8> = bytes.iter().flat_map(|&byte| vec![byte; HUGE]).collect();
        writer.pages(at(start), &pages).unwrap();
        writer.finish().unwrap();
        staging.publish(info()).unwrap();
        store.open(&id(number)).unwrap()
    };
    let base = write(1, None, 0, &[1, 2, 3]);
    let diff = write(2, Some(&base), 1, &[5, 0, 4]);
    let mut stop = |_| ControlFlow::Break(());
    store
        .merge(&diff, id(9), info(), &SMALL, &mut stop)
        .unwrap();
    let (merged, progress) = merge(&store, &diff, 9);
    assert_eq!((progress.resumed, progress.total), (count(1), count(3)));
    let mut page = vec![0; HUGE];
    for (index, byte) in [(0, 1), (1, 5), (2, 0), (3, 4)] {
        merged.read_page(at(index), &mut page).unwrap();
        assert!(page.iter().all(|&b| b == byte), "page {index}");
    }
    assert_eq!(merged.map().lookup(at(2)).unwrap().origin, Origin::Zero);
    assert!(verify(&store, &id(9)).is_clean());
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
    // Five chunks of the base, two of the first diff, one of the last.
    assert_eq!(cost.touched_bytes, 8 * (256 << 10));
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
