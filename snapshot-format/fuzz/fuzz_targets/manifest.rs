//! `manifest.json`: whatever is accepted names no file outside its directory, and is written as
//! something that reads the same.

#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use snapshot_format::Manifest;

/// What follows the digits of the checksum.
const TAIL: &[u8] = b"\"\n}\n";

fn check(bytes: &[u8]) {
    let name = Path::new("fuzz");
    let Ok(manifest) = Manifest::from_bytes(bytes, name) else {
        return;
    };
    for file in manifest.files.keys() {
        let components: Vec<_> = Path::new(file).components().collect();
        assert!(
            matches!(components.as_slice(), [Component::Normal(_)]),
            "{file:?}"
        );
    }
    // Only one that is longer than a manifest may be can't be written.
    if let Ok(written) = manifest.to_bytes() {
        let again = Manifest::from_bytes(&written, name).expect("what is written can be read");
        assert_eq!(again.files, manifest.files);
        assert_eq!((again.vmm, again.labels), (manifest.vmm, manifest.labels));
    }
}

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    // With its checksum made right: at the end, or in front of what the bytes end in.
    let body = bytes.strip_suffix(TAIL).unwrap_or(bytes);
    let digits = body.len().saturating_sub(8);
    let mut sealed = body[..digits].to_vec();
    let crc = crc32c::crc32c(&sealed);
    sealed.extend_from_slice(format!("{crc:08x}").as_bytes());
    sealed.extend_from_slice(TAIL);
    check(&sealed);
});
