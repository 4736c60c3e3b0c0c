//! Mistakes that other snapshot formats made, by number of the project's list.
//!
//! Number 1, merging neighbours whose storage is not contiguous, is tested beside the overlay:
//! only a map that this writer would not produce shows it.

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;

use snapshot_format::{Inspection, Origin, verify};
use support::{at, content, count, filled, id, publish, small_chain, temp_store};

#[test]
fn mistake_2_zero_page_over_content_reads_zero_and_the_old_content_stays_away() {
    let (_dir, store) = temp_store();
    let (base, _) = publish(&store, 1, None, 4, |writer| {
        writer.pages(at(0), &filled(&[1, 2, 3, 4])).unwrap();
    });
    let (diff, summary) = publish(&store, 2, Some(&base), 4, |writer| {
        writer.pages(at(1), &filled(&[0])).unwrap();
        writer.zero(at(3), count(1)).unwrap();
    });
    assert_eq!(content(&diff), [1, 0, 3, 0]);
    assert_eq!(summary.zero_pages_changed, count(2));
    assert_eq!(summary.stored_pages, count(0));
    assert_eq!(diff.map().lookup(at(1)).unwrap().origin, Origin::Zero);
    // And a grandchild that says nothing about them inherits zeros.
    let (grandchild, _) = publish(&store, 3, Some(&diff), 4, |writer| {
        writer.pages(at(0), &filled(&[7])).unwrap();
    });
    assert_eq!(content(&grandchild), [7, 0, 3, 0]);
}

#[test]
fn mistake_11_publishing_a_diff_touches_no_file_of_its_parent() {
    let (_dir, store) = temp_store();
    let (base, _) = publish(&store, 1, None, 4, |writer| {
        writer.pages(at(0), &filled(&[1, 2])).unwrap();
    });
    let state = || -> Vec<_> {
        let mut files: Vec<_> = fs::read_dir(base.dir())
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let metadata = entry.metadata().unwrap();
                let changed = (metadata.ctime(), metadata.ctime_nsec());
                (
                    entry.file_name(),
                    metadata.ino(),
                    changed,
                    fs::read(entry.path()).unwrap(),
                )
            })
            .collect();
        files.sort();
        files
    };
    let before = state();
    publish(&store, 2, Some(&base), 4, |writer| {
        writer.pages(at(0), &filled(&[3, 4])).unwrap();
    });
    assert_eq!(state(), before);
}

#[test]
fn mistake_11_build_that_exists_is_not_written_over() {
    let (_dir, store) = temp_store();
    let (base, _) = publish(&store, 1, None, 4, |writer| {
        writer.pages(at(0), &filled(&[1])).unwrap();
    });
    assert!(store.stage(id(1)).is_err());
    assert_eq!(content(&base), [1, 0, 0, 0]);
    assert!(verify(&store, &id(1)).is_clean());
}

#[test]
fn inspection_counts_own_inherited_and_zero_pages() {
    let (_dir, store) = temp_store();
    let (base, diff) = small_chain(&store);
    assert_eq!(content(&base), [0, 1, 2, 3, 0, 5, 0, 0]);
    assert_eq!(content(&diff), [9, 1, 0, 3, 0, 0, 0, 7]);
    let inspection = Inspection::of(&diff).unwrap();
    assert_eq!(inspection.own_pages, count(2));
    assert_eq!(inspection.inherited_pages, count(2));
    assert_eq!(inspection.zero_pages, count(4));
    assert_eq!(inspection.builds.len(), 2);
    assert_eq!(inspection.memory_bytes, 32 << 10);
}
