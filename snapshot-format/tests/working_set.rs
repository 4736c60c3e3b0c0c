//! Working sets: what is recorded is replayed, and whatever is not of this build is ignored.

mod support;

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use snapshot_format::{
    Build, IgnoredWorkingSet, MAX_WORKING_SET_RUNS, PageRun, WorkingSet, WorkingSetFile, verify,
};
use support::{at, count, filled, id, publish, small_chain, temp_store};

fn run(start: u64, pages: u64) -> PageRun {
    PageRun {
        start: at(start),
        pages: count(pages),
    }
}

fn recorded(build: &Build) -> WorkingSet {
    let touches = [3, 4, 5, 0, 7, 4, 1, 99].map(at);
    WorkingSet::record(build.map(), touches, count(100))
}

fn present(file: WorkingSetFile) -> WorkingSet {
    match file {
        WorkingSetFile::Present(set) => set,
        other => panic!("{other:?}"),
    }
}

#[test]
fn recorded_working_set_is_read_back_in_first_touch_order() {
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    assert!(matches!(diff.working_set(), WorkingSetFile::Missing));
    let set = recorded(&diff);
    assert_eq!(set.runs(), [run(3, 3), run(0, 1), run(7, 1), run(1, 1)]);
    assert_eq!(set.pages(), count(6));
    store.write_working_set(&diff, &set).unwrap();
    assert_eq!(present(diff.working_set()), set);
    assert!(verify(&store, &id(2)).is_clean());
    // And again, in its place.
    let other = WorkingSet::record(diff.map(), [at(6)], count(1));
    store.write_working_set(&diff, &other).unwrap();
    assert_eq!(present(diff.working_set()), other);
    assert_eq!(fs::read_dir(store.root()).unwrap().count(), 2);
}

#[test]
fn recording_keeps_the_first_pages_and_the_first_runs() {
    let (_dir, store) = temp_store();
    let pages = 3 * MAX_WORKING_SET_RUNS as u64;
    let (build, _) = publish(&store, 1, None, pages, |_| ());
    let set = WorkingSet::record(build.map(), (0..pages).map(at), count(10));
    assert_eq!(set.runs(), [run(0, 10)]);
    let scattered = (0..pages).step_by(2).map(at);
    let set = WorkingSet::record(build.map(), scattered, count(u64::MAX));
    assert_eq!(set.runs().len(), MAX_WORKING_SET_RUNS);
    assert_eq!(
        set.runs().last(),
        Some(&run(2 * (MAX_WORKING_SET_RUNS as u64 - 1), 1))
    );
    store.write_working_set(&build, &set).unwrap();
    assert_eq!(present(build.working_set()), set);
    // A longer file is refused without reading it whole.
    let path = build.dir().join("working-set");
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    let ignored = build.working_set();
    assert!(matches!(
        ignored,
        WorkingSetFile::Ignored(IgnoredWorkingSet::Corrupt(_))
    ));
}

#[test]
fn working_set_of_a_build_that_was_removed_meanwhile_leaves_nothing() {
    let (dir, store) = temp_store();
    let (base, diff) = small_chain(&store);
    store.remove(&diff.id()).unwrap();
    store
        .write_working_set(&diff, &recorded(&diff))
        .unwrap_err();
    let left = fs::read_dir(base.dir().parent().unwrap()).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, [base.dir()], "in {}", dir.path().display());
}

#[test]
fn working_set_of_another_build_is_stale() {
    let (_dir, store) = temp_store();
    let (base, diff) = small_chain(&store);
    store.write_working_set(&base, &recorded(&base)).unwrap();
    let file = |build: &Build| build.dir().join("working-set");
    fs::copy(file(&base), file(&diff)).unwrap();
    match diff.working_set() {
        WorkingSetFile::Ignored(IgnoredWorkingSet::Stale { build_id, .. }) => {
            assert_eq!(build_id, id(1));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(verify(&store, &id(2)).faults[0].file, file(&diff));
    assert!(store.open(&id(2)).is_ok());
}

#[test]
fn working_set_of_other_content_under_the_same_id_is_stale() {
    let (_dir, store) = temp_store();
    let (base, _) = publish(&store, 1, None, 8, |writer| {
        writer.pages(at(0), &filled(&[1])).unwrap();
    });
    let bytes = recorded(&base).to_bytes(base.map());
    store.remove(&id(1)).unwrap();
    let (other, _) = publish(&store, 1, None, 8, |writer| {
        writer.pages(at(0), &filled(&[2])).unwrap();
    });
    let file = WorkingSet::from_bytes(&bytes, other.map(), Path::new("set"));
    assert!(matches!(
        file,
        WorkingSetFile::Ignored(IgnoredWorkingSet::Stale { .. })
    ));
}

#[test]
fn every_flipped_bit_and_every_truncation_is_ignored_and_found_by_verify() {
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    let good = recorded(&diff).to_bytes(diff.map());
    let path = diff.dir().join("working-set");
    let ignored = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let ignored = matches!(diff.working_set(), WorkingSetFile::Ignored(_));
        ignored && !verify(&store, &id(2)).is_clean()
    };
    assert!(!ignored(&good));
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(ignored(&bad), "bit {bit}");
    }
    for length in 0..good.len() {
        assert!(ignored(&good[..length]), "length {length}");
    }
    assert!(ignored(&[good.as_slice(), &[0]].concat()));
}

#[test]
fn unreadable_working_set_is_ignored() {
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    fs::create_dir(diff.dir().join("working-set")).unwrap();
    let file = diff.working_set();
    assert!(
        matches!(
            file,
            WorkingSetFile::Ignored(IgnoredWorkingSet::Unreadable(_))
        ),
        "{file:?}"
    );
}

/// Makes both checksums right again.
fn reseal(file: &mut [u8]) {
    let masked = |bytes: &[u8]| {
        let crc = crc32c::crc32c(bytes).rotate_right(15);
        crc.wrapping_add(0xa282_ead8).to_le_bytes()
    };
    if file.len() >= 64 {
        let runs = masked(&file[64..]);
        file[56..60].copy_from_slice(&runs);
        let header = masked(&file[..60]);
        file[60..64].copy_from_slice(&header);
    }
}

thread_local! {
    static DIFF: Build = {
        let (_dir, store) = temp_store();
        small_chain(&store).1
    };
}

/// Whatever is not ignored can be replayed without a further check.
fn judge(bytes: &[u8]) -> bool {
    DIFF.with(
        |diff| match WorkingSet::from_bytes(bytes, diff.map(), Path::new("set")) {
            WorkingSetFile::Present(set) => {
                let mut touched = [false; 8];
                for run in set.runs() {
                    assert!(!run.pages.is_zero());
                    for page in 0..run.pages.get() {
                        let page = usize::try_from(run.start.get() + page).unwrap();
                        assert!(!std::mem::replace(&mut touched[page], true), "{page} twice");
                    }
                }
                true
            }
            WorkingSetFile::Ignored(_) => false,
            WorkingSetFile::Missing => panic!("there are bytes"),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 4000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_bytes_are_ignored(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(!judge(&bytes));
    }

    #[test]
    fn resealed_hostile_file_is_ignored_or_replayable(
        runs in prop::collection::vec((0u32..10, 0u32..4), 0..6),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
    ) {
        let mut bytes = DIFF.with(|diff| WorkingSet::record(diff.map(), [], count(0)).to_bytes(diff.map()));
        bytes[52..56].copy_from_slice(&u32::try_from(runs.len()).unwrap().to_le_bytes());
        for (start, pages) in &runs {
            bytes.extend_from_slice(&start.to_le_bytes());
            bytes.extend_from_slice(&pages.to_le_bytes());
        }
        for (position, byte) in &edits {
            let position = position.index(bytes.len());
            bytes[position] = *byte;
        }
        reseal(&mut bytes);
        let present = judge(&bytes);
        if edits.is_empty() {
            let mut touched = [0; 16];
            for (start, pages) in &runs {
                (*start..start + pages).for_each(|page| touched[page as usize] += 1);
            }
            let good = touched[..8].iter().all(|&times| times <= 1)
                && touched[8..].iter().all(|&times| times == 0)
                && runs.iter().all(|(_, pages)| *pages > 0);
            prop_assert_eq!(present, good);
        }
    }
}
