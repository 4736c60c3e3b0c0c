//! `working-set`: whatever is not ignored can be replayed without a further check.

#![no_main]

use std::collections::HashSet;
use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use snapshot_format::{MemoryMap, WorkingSet, WorkingSetFile};

/// The build that the files are for: 8 pages.
static MAP: LazyLock<MemoryMap> = LazyLock::new(|| {
    let bytes = include_bytes!("../../tests/golden/v1/02020202020202020202020202020202/memory.map");
    MemoryMap::from_bytes(bytes.to_vec(), Path::new("golden")).expect("the golden map is good")
});

fn masked(bytes: &[u8]) -> [u8; 4] {
    let crc = crc32c::crc32c(bytes).rotate_right(15);
    crc.wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Makes both checksums right.
fn seal(file: &mut [u8]) {
    if file.len() < 64 {
        return;
    }
    let runs = masked(&file[64..]);
    file[56..60].copy_from_slice(&runs);
    let header = masked(&file[..60]);
    file[60..64].copy_from_slice(&header);
}

fn check(bytes: &[u8]) {
    match WorkingSet::from_bytes(bytes, &MAP, Path::new("fuzz")) {
        WorkingSetFile::Present(set) => {
            let mut touched = HashSet::new();
            for run in set.runs() {
                assert!(!run.pages.is_zero());
                for page in 0..run.pages.get() {
                    let page = run.start.get() + page;
                    assert!(page < MAP.memory_pages().get());
                    assert!(touched.insert(page), "page {page} twice");
                }
            }
            assert_eq!(set.to_bytes(&MAP), bytes);
        }
        WorkingSetFile::Ignored(reason) => assert!(!reason.to_string().is_empty()),
        WorkingSetFile::Missing => panic!("there are bytes"),
    }
}

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    let mut sealed = bytes.to_vec();
    seal(&mut sealed);
    check(&sealed);
});
