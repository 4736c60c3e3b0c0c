//! `memory.sums`: whatever is accepted says of each chunk how long it is, and is no longer.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use snapshot_format::{DataSums, Encoding};

fn masked(bytes: &[u8]) -> [u8; 4] {
    let crc = crc32c::crc32c(bytes).rotate_right(15);
    crc.wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Makes both checksums right.
fn seal(file: &mut [u8]) {
    if file.len() < 64 {
        return;
    }
    let entries = masked(&file[64..]);
    file[56..60].copy_from_slice(&entries);
    let header = masked(&file[..60]);
    file[60..64].copy_from_slice(&header);
}

fn check(bytes: &[u8]) {
    let Ok(sums) = DataSums::from_bytes(bytes, Path::new("fuzz")) else {
        return;
    };
    assert_eq!(sums.sums().len() as u64, sums.header().chunk_count());
    let chunks = (0..sums.sums().len()).map(|chunk| sums.chunk_len(chunk));
    let content: u64 = chunks.sum();
    assert_eq!(content, sums.header().data_bytes);
    assert!(sums.stored_bytes() <= content);
    if sums.header().encoding == Encoding::Raw {
        assert_eq!(sums.stored_bytes(), content);
    }
}

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    let mut sealed = bytes.to_vec();
    seal(&mut sealed);
    check(&sealed);
});
