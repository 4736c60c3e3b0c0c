//! Export streams: an import publishes builds that verify, or leaves the store as it was.
//!
//! Headers get the checksum they should have, so that the fuzzer gets past it.

#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use snapshot_format::{BuildStore, ImportOptions, verify};

/// In memory, if there is such a place.
static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() {
        memory
    } else {
        std::env::temp_dir()
    };
    parent.join(format!("thaw-fuzz-{}", std::process::id()))
});

fn check(stream: &[u8]) {
    let store = BuildStore::open_or_create(&ROOT).expect("the store can be made");
    let options = ImportOptions { max_bytes: 1 << 20 };
    match store.import(stream, &options) {
        Ok(summary) => {
            assert!(store.contains(&summary.build));
            for build in &summary.published {
                assert!(verify(&store, build).is_clean());
            }
            for build in summary.published.iter().rev() {
                store.remove(build).expect("it was published");
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let left = fs::read_dir(&*ROOT).expect("the store is there").count();
    assert_eq!(left, 0, "a failed import leaves nothing");
}

/// Makes the checksum of every header right, as far as sizes lead from one to the next.
fn seal(stream: &mut [u8]) {
    let mut at = 0;
    while let Some(header) = stream.get_mut(at..at + 512) {
        if header.iter().all(|&byte| byte == 0) {
            break;
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let digits = header[124..136]
            .iter()
            .take_while(|byte| byte.is_ascii_digit());
        let size = digits.fold(0usize, |size, byte| {
            size.saturating_mul(8)
                .saturating_add(usize::from(byte - b'0'))
        });
        let Some(next) = size
            .checked_next_multiple_of(512)
            .and_then(|s| s.checked_add(at + 512))
        else {
            break;
        };
        at = next;
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut sealed = bytes.to_vec();
    seal(&mut sealed);
    check(&sealed);
});
