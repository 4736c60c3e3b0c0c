//! Merges that were stopped or crashed, and go on.

mod support;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

use snapshot_format::{
    Build, BuildStore, Encoding, FormatError, MergeOptions, MergeOutcome, MergeProgress, Origin,
    PageSize, verify,
};
use support::crashing::Crashing;
use support::{at, content, count, id, info, large_chain, temp_store};
use tempfile::TempDir;

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
    let outcome = store.merge(source, id(number), info(), &SMALL, &mut go_on);
    let MergeOutcome::Published(_, progress) = outcome.unwrap() else {
        panic!("nobody stopped it")
    };
    (store.open(&id(number)).unwrap(), progress)
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

/// After a crash at any step, the source is whole, the merged build is absent or whole, and
/// merging again succeeds.
#[test]
fn crash_at_any_step_of_a_merge_can_be_gone_on_from() {
    let ways = [
        (true, Encoding::Raw),
        (false, Encoding::Raw),
        (true, Encoding::Lz4),
    ];
    for (loses, encoding) in ways {
        let options = MergeOptions { encoding, ..SMALL };
        let mut resumed = 0;
        let mut step = 0;
        loop {
            let (_dir, store) = temp_store();
            let source = large_chain(&store);
            let crashing = Crashing::after(store.root(), step, false);
            let broken = BuildStore::with_storage(store.root(), crashing.clone()).unwrap();
            let result = broken.merge(&source, id(9), info(), &options, &mut go_on);
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
            let again = store.merge(&source, id(9), info(), &options, &mut go_on);
            match again {
                Ok(MergeOutcome::Published(_, progress)) => {
                    resumed += usize::from(!progress.resumed.is_zero());
                }
                // Published, and the journal already gone.
                Err(FormatError::AlreadyExists { .. }) if store.contains(&id(9)) => {}
                other => panic!("step {step}: {other:?}"),
            }
            let merged = store.open_cold(&id(9)).unwrap();
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
