//! Damaged and hostile files: every flipped bit is found, nothing panics.

mod support;

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use snapshot_format::{BuildStore, DataSums, FormatError, Manifest, MemoryMap, verify};
use support::{at, id, small_chain, temp_store};

const MAP: &str = "memory.map";

/// Flips every bit of a file in turn and returns the flips that `found` didn't find. Of large
/// files it flips one bit in each byte.
fn unfound_flips(store: &BuildStore, name: &str, found: impl Fn(&Path) -> bool) -> Vec<usize> {
    let path = store.path(&id(2)).join(name);
    let good = fs::read(&path).unwrap();
    let mut bytes = good.clone();
    let mut unfound = Vec::new();
    let step = if good.len() > 4096 { 9 } else { 1 };
    for bit in (0..good.len() * 8).step_by(step) {
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bytes).unwrap();
        if !found(&path) {
            unfound.push(bit);
        }
        bytes[bit / 8] = good[bit / 8];
    }
    fs::write(&path, &good).unwrap();
    unfound
}

fn flips_that_verify_misses(name: &str) -> Vec<usize> {
    let (_dir, store) = temp_store();
    small_chain(&store);
    assert!(verify(&store, &id(2)).is_clean());
    let unfound = unfound_flips(&store, name, |_| !verify(&store, &id(2)).is_clean());
    assert!(verify(&store, &id(2)).is_clean());
    unfound
}

#[test]
fn every_flipped_bit_of_the_map_is_found_by_verify() {
    assert_eq!(flips_that_verify_misses(MAP), [0; 0]);
}

#[test]
fn every_flipped_bit_of_the_sums_is_found_by_verify() {
    assert_eq!(flips_that_verify_misses("memory.sums"), [0; 0]);
}

#[test]
fn every_flipped_bit_of_the_manifest_is_found_by_verify() {
    assert_eq!(flips_that_verify_misses("manifest.json"), [0; 0]);
}

#[test]
fn every_flipped_bit_of_the_vmstate_is_found_by_verify() {
    assert_eq!(flips_that_verify_misses("vmstate"), [0; 0]);
}

#[test]
fn every_flipped_bit_of_the_data_is_found_by_verify() {
    assert_eq!(flips_that_verify_misses("memory.data"), [0; 0]);
}

#[test]
fn every_flipped_bit_of_the_map_the_sums_and_the_manifest_is_refused_by_its_reader() {
    let (_dir, store) = temp_store();
    small_chain(&store);
    let map = unfound_flips(&store, MAP, |path| MemoryMap::open(path).is_err());
    let sums = unfound_flips(&store, "memory.sums", |path| DataSums::open(path).is_err());
    let manifest = unfound_flips(&store, "manifest.json", |path| {
        Manifest::open(path).is_err()
    });
    assert_eq!((map, sums, manifest), (vec![], vec![], vec![]));
}

#[test]
fn truncation_at_every_length_is_an_error() {
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    let read = |name: &str| fs::read(diff.dir().join(name)).unwrap();
    let name = Path::new("truncated");
    let (map, sums, manifest) = (read(MAP), read("memory.sums"), read("manifest.json"));
    for length in 0..map.len() {
        assert!(
            MemoryMap::from_bytes(map[..length].to_vec(), name).is_err(),
            "{length}"
        );
        let path = diff.dir().join("cut");
        fs::write(&path, &map[..length]).unwrap();
        assert!(MemoryMap::open(&path).is_err(), "{length}");
    }
    for length in 0..sums.len() {
        assert!(
            DataSums::from_bytes(&sums[..length], name).is_err(),
            "{length}"
        );
    }
    for length in 0..manifest.len() {
        assert!(
            Manifest::from_bytes(&manifest[..length], name).is_err(),
            "{length}"
        );
    }
    let longer = [map.as_slice(), &[0]].concat();
    assert!(MemoryMap::from_bytes(longer, name).is_err());
}

#[test]
fn fault_in_the_data_names_file_chunk_and_both_checksums() {
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    let path = diff.dir().join("memory.data");
    let mut data = fs::read(&path).unwrap();
    data[5000] ^= 4;
    fs::write(&path, data).unwrap();
    let report = verify(&store, &id(2));
    let [fault] = report.faults.as_slice() else {
        panic!("{:?}", report.faults)
    };
    assert_eq!(
        (fault.file.as_path(), fault.offset, fault.what),
        (path.as_path(), 0, "data chunk")
    );
    assert_ne!(fault.expected, fault.found);
}

#[test]
fn verify_reports_faults_of_several_files_at_once() {
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    for name in ["vmstate", "manifest.json", MAP, "memory.sums"] {
        fs::write(diff.dir().join(name), "damaged").unwrap();
    }
    fs::write(diff.dir().join("stray"), "x").unwrap();
    let files: Vec<_> = verify(&store, &id(2))
        .faults
        .into_iter()
        .map(|f| f.file)
        .collect();
    for name in ["manifest.json", MAP, "memory.sums"] {
        assert!(files.contains(&diff.dir().join(name)), "{name}: {files:?}");
    }
}

#[test]
fn verify_reports_a_file_that_the_manifest_does_not_list() {
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    fs::write(diff.dir().join("stray"), "x").unwrap();
    let report = verify(&store, &id(2));
    assert_eq!(report.faults.len(), 1);
    assert_eq!(report.faults[0].file, diff.dir().join("stray"));
}

#[test]
fn map_of_a_later_version_is_unsupported_and_not_corrupt() {
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    let mut map = fs::read(diff.dir().join(MAP)).unwrap();
    map[8] = 2;
    let error = MemoryMap::from_bytes(map, Path::new("later")).unwrap_err();
    assert!(
        matches!(error, FormatError::Unsupported { found: 2, .. }),
        "{error}"
    );
}

/// Recomputes all checksums, as somebody would who wants the damage to be believed.
fn reseal(map: &mut [u8]) {
    let masked = |bytes: &[u8]| {
        let mask = crc32c::crc32c(bytes)
            .rotate_right(15)
            .wrapping_add(0xa282_ead8);
        mask.to_le_bytes()
    };
    let builds = u32::from_le_bytes(map[64..68].try_into().unwrap()) as usize;
    let extents = builds.saturating_mul(32).saturating_add(128);
    if extents <= map.len() {
        let (table, records) = (masked(&map[128..extents]), masked(&map[extents..]));
        map[68..72].copy_from_slice(&table);
        map[96..100].copy_from_slice(&records);
    }
    let header = masked(&map[..124]);
    map[124..128].copy_from_slice(&header);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whoever gets a map past the checks has a map whose every lookup is in bounds.
    #[test]
    fn resealed_hostile_map_is_refused_or_consistent(
        edits in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![
            Just(0u8), Just(1), Just(0xff), any::<u8>()
        ]), 1..6),
    ) {
        thread_local! {
            static MAP_BYTES: Vec<u8> = {
                let (_dir, store) = temp_store();
                let (_, diff) = small_chain(&store);
                fs::read(diff.dir().join(MAP)).unwrap()
            };
        }
        let mut bytes = MAP_BYTES.with(Clone::clone);
        for (position, byte) in edits {
            let position = position.index(bytes.len());
            bytes[position] = byte;
        }
        reseal(&mut bytes);
        if let Ok(map) = MemoryMap::from_bytes(bytes, Path::new("hostile")) {
            let mut next = at(0);
            for extent in map.all_extents() {
                prop_assert_eq!(extent.start, next);
                prop_assert_eq!(map.lookup(extent.start), Some(extent));
                prop_assert_eq!(map.lookup(at(extent.end().get() - 1)), Some(extent));
                if let snapshot_format::Origin::Build(index) = extent.origin {
                    let limit = map.builds()[usize::from(index)].data_pages;
                    prop_assert!((extent.storage + extent.pages).get() <= limit.get());
                }
                next = extent.end();
            }
            prop_assert_eq!(next.get(), map.memory_pages().get());
        }
    }

    #[test]
    fn random_bytes_are_never_a_map(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(MemoryMap::from_bytes(bytes.clone(), Path::new("random")).is_err());
        prop_assert!(DataSums::from_bytes(&bytes, Path::new("random")).is_err());
        prop_assert!(Manifest::from_bytes(&bytes, Path::new("random")).is_err());
    }
}
