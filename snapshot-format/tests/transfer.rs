//! Export and import: the same builds in another store, or no build at all.

mod support;

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;
use snapshot_format::{
    BuildId, BuildStore, FormatError, ImportOptions, MemoryWriter, PageSize, VerifyOptions,
    WorkingSet, WorkingSetFile, verify_with,
};
use support::chain::{mixed_chain, publish_chain};
use support::{at, content, count, filled, id, info, publish, small_chain, temp_store};

fn export(store: &BuildStore, build: BuildId) -> Vec<u8> {
    let mut stream = Vec::new();
    store.export(&build, &mut stream, &mut |_| {}).unwrap();
    stream
}

fn import(store: &BuildStore, stream: &[u8]) -> Result<Vec<BuildId>, FormatError> {
    let summary = store.import(stream, &ImportOptions::default())?;
    Ok(summary.published)
}

/// Clean, ancestors included.
fn assert_clean(store: &BuildStore, build: BuildId) {
    let options = VerifyOptions { ancestors: true };
    let report = verify_with(store, &build, options, &mut |_| {});
    assert!(report.is_clean(), "{:?}", report.faults);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn imported_chain_has_the_same_memory(chain in mixed_chain()) {
        let (_dir, store) = temp_store();
        let (last, memory) = publish_chain(&store, &chain);
        let stream = export(&store, last.id());
        let (_other_dir, other) = temp_store();
        let published = import(&other, &stream).unwrap();
        prop_assert_eq!(published.last(), Some(&last.id()));
        let imported = other.open(&last.id()).unwrap();
        prop_assert_eq!(content(&imported), memory);
        prop_assert_eq!(imported.manifest(), last.manifest());
        assert_clean(&other, last.id());
        // What was imported exports as what it was imported from.
        prop_assert!(export(&other, last.id()) == stream);
    }
}

#[test]
fn holes_do_not_travel_and_are_holes_again() {
    let (_dir, store) = temp_store();
    let staging = store.stage(id(1)).unwrap();
    let file = fs::File::create(staging.file_path("memory.data")).unwrap();
    file.set_len(1 << 30).unwrap();
    for megabyte in [0, 3, 1000] {
        file.write_all_at(&filled(&[5]), megabyte << 20).unwrap();
    }
    let pages = count((1 << 30) / 4096);
    MemoryWriter::adopt_sparse(&staging, None, PageSize::Size4K, pages).unwrap();
    staging.publish(info()).unwrap();
    let stream = export(&store, id(1));
    assert!(stream.len() < 100_000, "{}", stream.len());
    let (_other_dir, other) = temp_store();
    import(&other, &stream).unwrap();
    let data = fs::metadata(other.path(&id(1)).join("memory.data")).unwrap();
    assert_eq!(data.len(), 1 << 30);
    assert!(data.blocks() * 512 < 1 << 20);
    assert_clean(&other, id(1));
}

#[test]
fn ancestors_of_ancestors_travel_and_present_builds_are_skipped() {
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    // It takes nothing from build 1, but build 2 does.
    let (last, _) = publish(&store, 3, Some(&diff), 8, |writer| {
        writer.pages(at(1), &filled(&[7, 7, 7, 7, 7])).unwrap();
    });
    assert_eq!(last.map().builds().len(), 2);
    let stream = export(&store, id(3));
    let (_other_dir, other) = temp_store();
    small_chain(&other);
    let summary = other
        .import(stream.as_slice(), &ImportOptions::default())
        .unwrap();
    assert_eq!((summary.build, summary.published), (id(3), vec![id(3)]));
    assert_eq!(summary.present, [id(1), id(2)]);
    assert_eq!(content(&other.open(&id(3)).unwrap()), content(&last));
}

#[test]
fn other_build_under_the_same_id_is_not_replaced() {
    let (_dir, store) = temp_store();
    small_chain(&store);
    let stream = export(&store, id(2));
    let (_other_dir, other) = temp_store();
    publish(&other, 2, None, 8, |_| ());
    let error = import(&other, &stream).unwrap_err();
    assert!(matches!(error, FormatError::AlreadyExists { build_id, .. } if build_id == id(2)));
    assert_eq!(other.list().unwrap(), [id(2)], "build 1 was taken back");
    assert_eq!(content(&other.open(&id(2)).unwrap()), [0; 8]);
}

#[test]
fn working_set_travels_if_it_fits() {
    let (_dir, store) = temp_store();
    let (base, diff) = small_chain(&store);
    let set = WorkingSet::record(diff.map(), [at(3), at(0)], count(9));
    store.write_working_set(&diff, &set).unwrap();
    let stale = diff.dir().join("working-set");
    fs::copy(stale, base.dir().join("working-set")).unwrap();
    let (_other_dir, other) = temp_store();
    import(&other, &export(&store, id(2))).unwrap();
    let read = |number| other.open(&id(number)).unwrap().working_set();
    assert!(matches!(read(1), WorkingSetFile::Missing));
    assert!(matches!(read(2), WorkingSetFile::Present(found) if found == set));
}

#[test]
fn export_to_a_writer_that_fails_is_an_error() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let room = self.0.min(bytes.len());
            self.0 -= room;
            Ok(room)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (_dir, store) = temp_store();
    small_chain(&store);
    for room in [0, 600, 20_000] {
        let error = store.export(&id(2), Full(room), &mut |_| {}).unwrap_err();
        assert!(matches!(error, FormatError::Io { .. }), "{error}");
    }
}
