//! The store: what opening refuses, what removing leaves, what staging cleans up.

mod support;

use std::fs;
use std::io::Read;

use snapshot_format::{
    BuildStore, FormatError, MemoryWriter, PageSize, VerifyOptions, verify, verify_data,
    verify_with,
};
use support::{at, content, count, filled, id, info, publish, small_chain, temp_store};

#[test]
fn build_whose_ancestor_is_missing_is_refused_by_name() {
    let (_dir, store) = temp_store();
    small_chain(&store);
    store.remove(&id(1)).unwrap();
    let error = store.open(&id(2)).unwrap_err();
    assert!(
        matches!(error, FormatError::AncestorMissing { ancestor, .. } if ancestor == id(1)),
        "{error}"
    );
    let report = verify(&store, &id(2));
    assert_eq!(report.faults.len(), 1);
    assert!(
        report.faults[0].found.contains(&id(1).to_string()),
        "{:?}",
        report.faults
    );
}

#[test]
fn build_whose_ancestor_has_other_data_is_refused_by_name() {
    let (_dir, store) = temp_store();
    small_chain(&store);
    store.remove(&id(1)).unwrap();
    // The same id again, whole, with one page of other content.
    publish(&store, 1, None, 8, |writer| {
        writer.pages(at(1), &filled(&[1, 2, 4, 0, 5])).unwrap();
    });
    let error = store.open(&id(2)).unwrap_err();
    assert!(
        matches!(error, FormatError::AncestorChanged { ancestor, .. } if ancestor == id(1)),
        "{error}"
    );
    assert!(!verify(&store, &id(2)).is_clean());
}

#[test]
fn flipped_bit_of_an_ancestor_is_found_when_ancestors_are_verified() {
    let (_dir, store) = temp_store();
    let (base, _) = small_chain(&store);
    let path = base.dir().join("memory.data");
    let mut data = fs::read(&path).unwrap();
    data[100] ^= 1;
    fs::write(&path, data).unwrap();
    assert!(verify(&store, &id(2)).is_clean());
    let mut told = 0;
    let options = VerifyOptions { ancestors: true };
    let report = verify_with(&store, &id(2), options, &mut |_| told += 1);
    assert_eq!(report.faults[0].file, path);
    assert_eq!(report.ancestors, [id(1)]);
    assert!(told > 1);
    assert_eq!(verify_data(&base, &mut |_| {}).unwrap().len(), 1);
}

#[test]
fn data_file_that_is_too_short_is_refused() {
    let (_dir, store) = temp_store();
    let (base, _) = small_chain(&store);
    let data = fs::File::options()
        .write(true)
        .open(base.dir().join("memory.data"))
        .unwrap();
    data.set_len(4096).unwrap();
    for number in [1, 2] {
        let error = store.open(&id(number)).unwrap_err();
        assert!(matches!(error, FormatError::Corrupt(_)), "{error}");
    }
}

#[test]
fn removed_build_stays_readable_for_who_has_it_open() {
    let (_dir, store) = temp_store();
    let (base, diff) = small_chain(&store);
    store.remove(&id(2)).unwrap();
    store.remove(&id(1)).unwrap();
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(content(&base), [0, 1, 2, 3, 0, 5, 0, 0]);
    assert_eq!(content(&diff), [9, 1, 0, 3, 0, 0, 0, 7]);
    assert!(matches!(
        store.open(&id(1)),
        Err(FormatError::NotFound { .. })
    ));
    assert!(matches!(
        store.remove(&id(1)),
        Err(FormatError::NotFound { .. })
    ));
}

#[test]
fn dropped_staging_leaves_nothing() {
    let (_dir, store) = temp_store();
    let staging = store.stage(id(1)).unwrap();
    fs::write(staging.file_path("vmstate"), "x").unwrap();
    assert!(matches!(
        store.stage(id(1)),
        Err(FormatError::AlreadyExists { .. })
    ));
    drop(staging);
    assert_eq!(fs::read_dir(store.root()).unwrap().count(), 0);
    assert!(store.stage(id(1)).is_ok());
}

#[test]
fn remove_staging_clears_leftovers_and_nothing_else() {
    let (_dir, store) = temp_store();
    small_chain(&store);
    let names = [format!(".staging-{}", id(7)), format!(".trash-{}", id(8))];
    for name in &names {
        fs::create_dir(store.root().join(name)).unwrap();
        fs::write(store.root().join(name).join("x"), "x").unwrap();
    }
    fs::create_dir(store.root().join("lost+found")).unwrap();
    // A working set that was being written, and a file of somebody's.
    let half = store.root().join(format!(".working-set-{}", id(1)));
    for file in [&half, &store.root().join(".working-set-notes")] {
        fs::write(file, "x").unwrap();
    }
    assert_eq!(store.remove_staging().unwrap().len(), 2);
    assert_eq!(store.list().unwrap(), [id(1), id(2)]);
    assert!(store.root().join("lost+found").exists());
    assert!(!half.exists());
    assert!(store.root().join(".working-set-notes").exists());
}

#[test]
fn file_that_nobody_registered_is_not_published() {
    let (_dir, store) = temp_store();
    let staging = store.stage(id(1)).unwrap();
    let writer = staging
        .memory_writer(None, PageSize::Size4K, count(1))
        .unwrap();
    writer.finish().unwrap();
    fs::write(staging.file_path("log"), "x").unwrap();
    let error = staging.publish(info()).unwrap_err();
    assert!(
        matches!(&error, FormatError::Unregistered { name } if name == "log"),
        "{error}"
    );
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn file_that_two_builds_share_is_read_for_its_checksum_once_and_verified_in_both() {
    let (dir, store) = temp_store();
    let shared = dir.path().join("image");
    fs::write(&shared, [7; 5000]).unwrap();
    let stage = |number: u8| {
        let staging = store.stage(id(number)).unwrap();
        let writer = staging.memory_writer(None, PageSize::Size4K, count(2));
        writer.unwrap().finish().unwrap();
        fs::hard_link(&shared, staging.file_path("rootfs.base")).unwrap();
        staging
    };
    let mut first = stage(1);
    let entry = first.add_file("rootfs.base").unwrap();
    first.publish(info()).unwrap();
    let mut second = stage(2);
    second.add_known_file("rootfs.base", entry).unwrap();
    let refused = second.add_known_file("memory.data", entry).unwrap_err();
    assert!(matches!(refused, FormatError::FileName { .. }), "{refused}");
    second.publish(info()).unwrap();
    for number in [1, 2] {
        assert!(verify(&store, &id(number)).is_clean());
    }
    // Whoever writes to it is found out by either.
    fs::write(&shared, [8; 5000]).unwrap();
    for number in [1, 2] {
        assert_eq!(verify(&store, &id(number)).faults.len(), 1);
    }
}

#[test]
fn build_without_memory_is_not_published() {
    let (_dir, store) = temp_store();
    let staging = store.stage(id(1)).unwrap();
    assert!(staging.publish(info()).is_err());
    assert_eq!(fs::read_dir(store.root()).unwrap().count(), 0);
}

#[test]
fn writer_refuses_pages_out_of_order_outside_or_in_part() {
    let (_dir, store) = temp_store();
    let staging = store.stage(id(1)).unwrap();
    let mut writer = staging
        .memory_writer(None, PageSize::Size4K, count(4))
        .unwrap();
    writer.pages(at(1), &filled(&[1, 2])).unwrap();
    let again = writer.pages(at(2), &filled(&[1])).unwrap_err();
    assert!(matches!(again, FormatError::OutOfOrder { .. }), "{again}");
    let outside = writer.pages(at(3), &filled(&[1, 2])).unwrap_err();
    assert!(
        matches!(outside, FormatError::OutsideMemory { .. }),
        "{outside}"
    );
    let far = writer.zero(at(u64::MAX), count(2)).unwrap_err();
    assert!(matches!(far, FormatError::OutsideMemory { .. }), "{far}");
    let part = writer.pages(at(3), &[1; 100]).unwrap_err();
    assert!(matches!(part, FormatError::PartialPage { .. }), "{part}");
}

#[test]
fn diff_of_another_geometry_than_its_parent_is_refused() {
    let (_dir, store) = temp_store();
    let (base, _) = publish(&store, 1, None, 512, |_| ());
    let staging = store.stage(id(2)).unwrap();
    for (page_size, pages) in [(PageSize::Size4K, 511), (PageSize::Size2M, 512)] {
        let error = staging
            .memory_writer(Some(&base), page_size, count(pages))
            .unwrap_err();
        assert!(
            matches!(error, FormatError::ParentGeometry { .. }),
            "{error}"
        );
    }
    for pages in [0, (1 << 32) + 1] {
        let error = staging
            .memory_writer(None, PageSize::Size4K, count(pages))
            .unwrap_err();
        assert!(matches!(error, FormatError::MemorySize { .. }), "{error}");
    }
}

#[test]
fn chain_of_two_mebibyte_pages_reads_back() {
    const HUGE: usize = 2 << 20;
    let (_dir, store) = temp_store();
    let write = |number: u8, parent: Option<&snapshot_format::Build>, start, bytes: &[u8]| {
        let staging = store.stage(id(number)).unwrap();
        let mut writer = staging
            .memory_writer(parent, PageSize::Size2M, count(4))
            .unwrap();
        let pages: Vec<u8> = bytes.iter().flat_map(|&byte| vec![byte; HUGE]).collect();
        writer.pages(at(start), &pages).unwrap();
        let summary = writer.finish().unwrap();
        staging.publish(info()).unwrap();
        (store.open(&id(number)).unwrap(), summary)
    };
    let (base, _) = write(1, None, 0, &[1, 2, 3]);
    let (diff, summary) = write(2, Some(&base), 1, &[2, 0, 4]);
    assert_eq!(summary.dropped_pages, count(1));
    assert_eq!(summary.bytes, HUGE as u64);
    let mut page = vec![0; HUGE];
    for (index, byte) in [(0, 1), (1, 2), (2, 0), (3, 4)] {
        diff.read_page(at(index), &mut page).unwrap();
        assert!(page.iter().all(|&b| b == byte), "page {index}");
    }
    assert!(verify(&store, &id(2)).is_clean());
}

#[test]
fn adopted_file_is_not_copied_and_keeps_its_holes() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let (_dir, store) = temp_store();
    let staging = store.stage(id(1)).unwrap();
    let path = staging.file_path("memory.data");
    let file = fs::File::create(&path).unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(&filled(&[5]), 40 << 20).unwrap();
    let before = file.metadata().unwrap();
    let pages = count((64 << 20) / 4096);
    let summary = MemoryWriter::adopt_sparse(&staging, None, PageSize::Size4K, pages).unwrap();
    assert_eq!((summary.stored_pages, summary.extents), (count(1), 3));
    let published = staging.publish(info()).unwrap();
    let after = fs::metadata(published.dir.join("memory.data")).unwrap();
    assert_eq!(
        (before.ino(), before.blocks()),
        (after.ino(), after.blocks())
    );
    let build = store.open(&id(1)).unwrap();
    let extent = build.map().lookup(at(10240)).unwrap();
    assert_eq!((extent.start, extent.storage), (at(10240), at(10240)));
    assert!(verify(&store, &id(1)).is_clean());
}

#[test]
fn adopted_diff_with_half_a_page_written_is_refused() {
    use std::os::unix::fs::FileExt;
    let (_dir, store) = temp_store();
    let publish_empty = |number: u8| {
        let staging = store.stage(id(number)).unwrap();
        let writer = staging
            .memory_writer(None, PageSize::Size2M, count(2))
            .unwrap();
        writer.finish().unwrap();
        staging.publish(info()).unwrap();
        store.open(&id(number)).unwrap()
    };
    let base = publish_empty(1);
    let staging = store.stage(id(2)).unwrap();
    let file = fs::File::create(staging.file_path("memory.data")).unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_all_at(&[1; 4096], 8192).unwrap();
    let adopt = |parent| MemoryWriter::adopt_sparse(&staging, parent, PageSize::Size2M, count(2));
    let error = adopt(Some(&base)).unwrap_err();
    assert!(
        matches!(error, FormatError::HoleGranularity { .. }),
        "{error}"
    );
    // Over nothing, holes are zeros, and the page is what the file says.
    assert_eq!(adopt(None).unwrap().stored_pages, count(1));
}

#[test]
fn manifest_says_what_the_publisher_said() {
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    let manifest = diff.manifest();
    assert_eq!(manifest.created_at_ms, info().created_at_ms);
    assert_eq!(manifest.labels, info().labels);
    assert_eq!(manifest.vmm, info().vmm);
    assert_eq!(manifest.parent, Some(id(1)));
    let names: Vec<_> = manifest.files.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        ["memory.data", "memory.map", "memory.sums", "vmstate"]
    );
    let mut text = String::new();
    let mut file = fs::File::open(diff.dir().join("manifest.json")).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert!(text.contains("\"page_size\": 4096"), "{text}");
}

#[test]
fn store_is_created_with_its_parents() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a/b/builds");
    let store = BuildStore::open_or_create(&root).unwrap();
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(store.path(&id(1)), root.join("01".repeat(16)));
    assert!(!store.contains(&id(1)));
}
