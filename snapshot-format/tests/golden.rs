//! Format version 1, byte for byte.
//!
//! `golden/v1` holds a base and a diff as they were first written. A writer that produces other
//! bytes, or a reader that can't read these, has changed the format. To write them anew, after
//! deciding to do that: `THAW_BLESS=1 cargo test -p snapshot-format --test golden`.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use snapshot_format::{BuildStore, VerifyOptions, verify_with};
use support::{content, id, small_chain};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

/// Every file under a store, by its path inside.
fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for dir in fs::read_dir(root).unwrap() {
        for file in fs::read_dir(dir.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_owned();
            files.insert(name, fs::read(&path).unwrap());
        }
    }
    files
}

#[test]
fn writer_produces_the_golden_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = BuildStore::open_or_create(dir.path()).unwrap();
    small_chain(&store);
    let written = files(store.root());
    if std::env::var_os("THAW_BLESS").is_some() {
        for (name, bytes) in &written {
            let path = golden().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }
    let expected = files(&golden());
    assert_eq!(written.len(), expected.len());
    for (name, bytes) in &written {
        assert!(
            expected.get(name) == Some(bytes),
            "{} differs",
            name.display()
        );
    }
}

#[test]
fn golden_files_are_read() {
    let store = BuildStore::open_or_create(&golden()).unwrap();
    assert_eq!(store.list().unwrap(), [id(1), id(2)]);
    assert_eq!(
        content(&store.open(&id(1)).unwrap()),
        [0, 1, 2, 3, 0, 5, 0, 0]
    );
    assert_eq!(
        content(&store.open(&id(2)).unwrap()),
        [9, 1, 0, 3, 0, 0, 0, 7]
    );
    let options = VerifyOptions { ancestors: true };
    assert!(verify_with(&store, &id(2), options, &mut |_| {}).is_clean());
}
