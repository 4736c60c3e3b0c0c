//! Small builds for tests.

#![allow(dead_code, reason = "every test binary uses a part of it")]

pub(crate) mod chain;
pub(crate) mod crashing;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;

use snapshot_format::{
    Build, BuildId, BuildStore, DiskStorage, MemoryWriter, PageCount, PageIndex, PageSize,
    PublishInfo, Storage, WriteSummary,
};
use tempfile::TempDir;

pub(crate) const PAGE: usize = 4096;

/// The disk, without waiting for it: no test here can tell.
#[derive(Debug)]
struct Unsynced;

impl Storage for Unsynced {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        DiskStorage.create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        DiskStorage.create_file(path)
    }

    fn write_at(&self, file: &File, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        DiskStorage.write_at(file, path, offset, bytes)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        File::open(path).map(drop)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path).map(drop)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        DiskStorage.rename(from, to)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        DiskStorage.remove_dir_all(path)
    }
}

/// A store that goes away with its test.
pub(crate) fn temp_store() -> (TempDir, BuildStore) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("builds");
    let store = BuildStore::with_storage(&root, Arc::new(Unsynced)).unwrap();
    (dir, store)
}

pub(crate) fn id(number: u8) -> BuildId {
    BuildId::from_bytes([number; 16])
}

pub(crate) fn at(page: u64) -> PageIndex {
    PageIndex::new(page)
}

pub(crate) fn count(pages: u64) -> PageCount {
    PageCount::new(pages)
}

/// Pages filled with one byte each.
pub(crate) fn filled(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|&byte| [byte; PAGE]).collect()
}

pub(crate) fn info() -> PublishInfo {
    PublishInfo {
        created_at_ms: 1_700_000_000_000,
        vmm: BTreeMap::from([("name".into(), "firecracker".into())]),
        labels: BTreeMap::from([("vcpus".into(), "2".into())]),
    }
}

/// Publishes a build whose memory `write` fills, with a `vmstate`.
pub(crate) fn publish(
    store: &BuildStore,
    number: u8,
    parent: Option<&Build>,
    pages: u64,
    write: impl FnOnce(&mut MemoryWriter),
) -> (Build, WriteSummary) {
    let mut staging = store.stage(id(number)).unwrap();
    let mut writer = staging
        .memory_writer(parent, PageSize::Size4K, count(pages))
        .unwrap();
    write(&mut writer);
    let summary = writer.finish().unwrap();
    fs::write(
        staging.file_path("vmstate"),
        format!("state of build {number}"),
    )
    .unwrap();
    staging.add_file("vmstate").unwrap();
    staging.publish(info()).unwrap();
    (store.open(&id(number)).unwrap(), summary)
}

/// The first byte of every page, after checking that the page is filled with it.
pub(crate) fn content(build: &Build) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    (0..build.map().memory_pages().get())
        .map(|index| {
            build.read_page(at(index), &mut page).unwrap();
            assert!(
                page.iter().all(|&byte| byte == page[0]),
                "page {index} is torn"
            );
            page[0]
        })
        .collect()
}

/// A base of 8 pages and a diff with own, inherited, zeroed and equal pages.
pub(crate) fn small_chain(store: &BuildStore) -> (Build, Build) {
    let (base, _) = publish(store, 1, None, 8, |writer| {
        writer.pages(at(1), &filled(&[1, 2, 3, 0, 5])).unwrap();
    });
    let (diff, _) = publish(store, 2, Some(&base), 8, |writer| {
        writer.pages(at(0), &filled(&[9, 1, 0])).unwrap();
        writer.zero(at(5), count(2)).unwrap();
        writer.pages(at(7), &filled(&[7])).unwrap();
    });
    (base, diff)
}

/// A base of 300 pages and two diffs over it: five chunks of content.
pub(crate) fn large_chain(store: &BuildStore) -> Build {
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
