//! `memory.map`: whatever is accepted can be looked up anywhere without a further check.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use snapshot_format::{MemoryMap, Origin, PageCount, PageIndex};

fn masked(bytes: &[u8]) -> [u8; 4] {
    let crc = crc32c::crc32c(bytes).rotate_right(15);
    crc.wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Makes all checksums right, as somebody would who wants to be believed.
fn seal(map: &mut [u8]) {
    if map.len() < 128 {
        return;
    }
    let builds = u32::from_le_bytes([map[64], map[65], map[66], map[67]]) as usize;
    let extents = builds.saturating_mul(32).saturating_add(128);
    if extents <= map.len() {
        let (table, records) = (masked(&map[128..extents]), masked(&map[extents..]));
        map[68..72].copy_from_slice(&table);
        map[96..100].copy_from_slice(&records);
    }
    let header = masked(&map[..124]);
    map[124..128].copy_from_slice(&header);
}

fn check(map: &MemoryMap) {
    let mut next = PageIndex::new(0);
    let mut cursor = map.cursor();
    for extent in map.all_extents() {
        assert_eq!(extent.start, next);
        next = extent.end();
        let last = PageIndex::new(next.get() - 1);
        for page in [extent.start, last] {
            assert_eq!(map.lookup(page), Some(extent));
            assert_eq!(cursor.lookup(page), Some(extent));
        }
        if let Origin::Build(index) = extent.origin {
            let limit = map.builds()[usize::from(index)].data_pages;
            assert!((extent.storage + extent.pages).get() <= limit.get());
        }
    }
    assert_eq!(next, PageIndex::new(0) + map.memory_pages());
    assert_eq!(map.lookup(next), None);
    let all = PageIndex::new(0)..next;
    let pages: PageCount = map.origin_runs(all).map(|run| run.pages).sum();
    assert_eq!(pages, map.memory_pages());
}

fuzz_target!(|bytes: &[u8]| {
    let name = Path::new("fuzz");
    if let Ok(map) = MemoryMap::from_bytes(bytes.to_vec(), name) {
        check(&map);
    }
    let mut sealed = bytes.to_vec();
    seal(&mut sealed);
    if let Ok(map) = MemoryMap::from_bytes(sealed, name) {
        check(&map);
    }
});
