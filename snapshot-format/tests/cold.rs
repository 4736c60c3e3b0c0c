//! Encoded builds: the same memory in fewer bytes; served by nobody by mistake; damage found.

mod support;

use std::fs;
use std::ops::ControlFlow;

use snapshot_format::{
    Build, BuildStore, DataSums, Encoding, FormatError, ImportOptions, MergeOptions, MergeOutcome,
    PageSize, VerifyOptions, verify, verify_data, verify_with,
};
use support::{PAGE, at, content, count, filled, id, info, large_chain, temp_store};

const ENCODED: [Encoding; 2] = [Encoding::Lz4, Encoding::Zstd];
const COLD: u8 = 9;

fn options(encoding: Encoding) -> MergeOptions {
    MergeOptions {
        window_bytes: 1,
        checkpoint_bytes: 1,
        encoding,
    }
}

fn merge(store: &BuildStore, source: &Build, number: u8, encoding: Encoding) -> Build {
    let mut go_on = |_| ControlFlow::Continue(());
    let merged = store.merge(source, id(number), info(), &options(encoding), &mut go_on);
    assert!(
        matches!(merged, Ok(MergeOutcome::Published(..))),
        "{merged:?}"
    );
    store.open_cold(&id(number)).unwrap()
}

fn cold_store(encoding: Encoding) -> (tempfile::TempDir, BuildStore, Build, Build) {
    let (dir, store) = temp_store();
    let source = large_chain(&store);
    let cold = merge(&store, &source, COLD, encoding);
    (dir, store, source, cold)
}

#[test]
fn any_range_of_a_cold_build_reads_like_its_source() {
    for encoding in ENCODED {
        let (_dir, store, source, cold) = cold_store(encoding);
        assert_eq!(cold.data_files()[0].encoding(), encoding);
        let memory = filled(&content(&source));
        for start in (0..320).step_by(7) {
            for pages in [1, 2, 63, 64, 65, 200] {
                let pages = pages.min(320 - start);
                let mut read = vec![9; pages * PAGE];
                cold.read_range(at(start as u64), &mut read).unwrap();
                assert!(
                    read == memory[start * PAGE..][..pages * PAGE],
                    "{start} {pages}"
                );
            }
        }
        let data = fs::metadata(cold.data_files()[0].path()).unwrap().len();
        let raw = cold.data_files()[0].pages().get() * PAGE as u64;
        assert!(data < raw / 10, "{encoding}: {data} of {raw}");
        assert!(verify(&store, &id(COLD)).is_clean());
        assert_eq!(verify_data(&cold, &mut |_| {}).unwrap(), []);
    }
}

#[test]
fn cold_build_and_a_diff_over_it_are_not_opened_to_be_served() {
    let (_dir, store, source, cold) = cold_store(Encoding::Lz4);
    let refused = |number| match store.open(&id(number)) {
        Err(FormatError::Cold {
            ancestor, encoding, ..
        }) => {
            assert_eq!((ancestor, encoding), (id(COLD), Encoding::Lz4));
        }
        other => panic!("{other:?}"),
    };
    refused(COLD);
    let staging = store.stage(id(10)).unwrap();
    let writer = staging.memory_writer(Some(&cold), PageSize::Size4K, count(320));
    let mut writer = writer.unwrap();
    // One page is new, one is what the cold build has.
    let known = content(&source)[101];
    writer.pages(at(100), &filled(&[99, known])).unwrap();
    let summary = writer.finish().unwrap();
    assert_eq!(
        (summary.stored_pages, summary.dropped_pages),
        (count(1), count(1))
    );
    staging.publish(info()).unwrap();
    refused(10);
    let mut memory = content(&source);
    memory[100] = 99;
    assert_eq!(content(&store.open_cold(&id(10)).unwrap()), memory);
    // Merged without encoding, it can be served again.
    merge(
        &store,
        &store.open_cold(&id(10)).unwrap(),
        11,
        Encoding::Raw,
    );
    assert_eq!(content(&store.open(&id(11)).unwrap()), memory);
}

#[test]
fn cold_build_is_exported_and_imported() {
    for encoding in ENCODED {
        let (_dir, store, source, _) = cold_store(encoding);
        let mut stream = Vec::new();
        store.export(&id(COLD), &mut stream, &mut |_| {}).unwrap();
        let (_other_dir, other) = temp_store();
        other
            .import(stream.as_slice(), &ImportOptions::default())
            .unwrap();
        assert_eq!(
            content(&other.open_cold(&id(COLD)).unwrap()),
            content(&source)
        );
        let options = VerifyOptions { ancestors: true };
        assert!(verify_with(&other, &id(COLD), options, &mut |_| {}).is_clean());
    }
}

#[test]
fn stopped_merge_goes_on_in_the_same_encoding_and_not_in_another() {
    for encoding in ENCODED {
        let (_dir, store) = temp_store();
        let source = large_chain(&store);
        let mut calls = 0;
        let mut stop = |_| {
            calls += 1;
            if calls == 2 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        store
            .merge(&source, id(COLD), info(), &options(encoding), &mut stop)
            .unwrap();
        let resumed = |number| {
            let mut resumed = None;
            let mut note = |progress: snapshot_format::MergeProgress| {
                resumed.get_or_insert(progress.resumed);
                ControlFlow::Continue(())
            };
            let options = options(number);
            store
                .merge(&source, id(COLD), info(), &options, &mut note)
                .unwrap();
            assert_eq!(
                content(&store.open_cold(&id(COLD)).unwrap()),
                content(&source)
            );
            assert!(verify(&store, &id(COLD)).is_clean());
            store.remove(&id(COLD)).unwrap();
            resumed
        };
        assert_eq!(resumed(encoding), Some(count(128)));
        store
            .merge(&source, id(COLD), info(), &options(encoding), &mut |_| {
                ControlFlow::Break(())
            })
            .unwrap();
        assert_eq!(resumed(Encoding::Raw), Some(count(0)));
    }
}

#[test]
fn every_flipped_bit_is_found_by_verify_and_never_read_as_content() {
    for encoding in ENCODED {
        let (_dir, store, source, cold) = cold_store(encoding);
        let memory = filled(&content(&source));
        for name in ["memory.data", "memory.sums"] {
            let path = cold.dir().join(name);
            let good = fs::read(&path).unwrap();
            for byte in 0..good.len() {
                let mut bad = good.clone();
                bad[byte] ^= 1 << (byte % 8);
                fs::write(&path, bad).unwrap();
                assert!(
                    !verify(&store, &id(COLD)).is_clean(),
                    "{encoding} {name} {byte}"
                );
                let opened = if byte % 5 == 0 {
                    store.open_cold(&id(COLD))
                } else {
                    continue;
                };
                if let Ok(build) = opened {
                    let mut read = vec![0; memory.len()];
                    assert!(build.read_range(at(0), &mut read).is_err(), "{name} {byte}");
                }
            }
            fs::write(&path, &good).unwrap();
        }
        assert!(verify(&store, &id(COLD)).is_clean());
    }
}

/// Recomputes both checksums of a sums file.
fn reseal(sums: &mut [u8]) {
    let masked = |bytes: &[u8]| {
        let crc = crc32c::crc32c(bytes).rotate_right(15);
        crc.wrapping_add(0xa282_ead8).to_le_bytes()
    };
    let entries = masked(&sums[64..]);
    sums[56..60].copy_from_slice(&entries);
    let header = masked(&sums[..60]);
    sums[60..64].copy_from_slice(&header);
}

#[test]
fn chunk_of_no_bytes_or_longer_than_its_content_is_refused() {
    let (_dir, _store, _, cold) = cold_store(Encoding::Zstd);
    let path = cold.dir().join("memory.sums");
    let good = fs::read(&path).unwrap();
    assert!(DataSums::from_bytes(&good, &path).is_ok());
    for length in [0, (256 << 10) + 1, u32::MAX] {
        let mut bad = good.clone();
        bad[64..68].copy_from_slice(&length.to_le_bytes());
        reseal(&mut bad);
        let error = DataSums::from_bytes(&bad, &path).unwrap_err();
        assert!(matches!(error, FormatError::Corrupt(_)), "{error}");
    }
    let mut unknown = good;
    unknown[12] = 3;
    reseal(&mut unknown);
    let error = DataSums::from_bytes(&unknown, &path).unwrap_err();
    assert!(
        matches!(
            error,
            FormatError::Unsupported {
                what: "encoding",
                found: 3,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn hostile_chunk_with_good_checksums_is_a_fault() {
    for encoding in ENCODED {
        let (_dir, _store, _, cold) = cold_store(encoding);
        let (data_path, sums_path) = (
            cold.dir().join("memory.data"),
            cold.dir().join("memory.sums"),
        );
        let (mut data, mut sums) = (fs::read(&data_path).unwrap(), fs::read(&sums_path).unwrap());
        let first = u32::from_le_bytes(sums[64..68].try_into().unwrap()) as usize;
        for seed in 0..200u32 {
            for (number, byte) in (0u32..).zip(&mut data[..first]) {
                *byte = (seed.wrapping_mul(2_654_435_761) ^ number.wrapping_mul(40_503) >> 3) as u8;
            }
            let crc = crc32c::crc32c(&data[..first]);
            sums[68..72].copy_from_slice(&crc.to_le_bytes());
            reseal(&mut sums);
            fs::write(&data_path, &data).unwrap();
            fs::write(&sums_path, &sums).unwrap();
            assert_eq!(
                verify_data(&cold, &mut |_| {}).unwrap().len(),
                1,
                "{encoding} {seed}"
            );
        }
    }
}
