//! Digests, and files that are either the old or the new one, never half of one.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// SHA-256 of some bytes, in hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// SHA-256 of a file, in hexadecimal.
pub(crate) fn digest_file(path: &Path) -> Result<String> {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hexadecimal(&hasher.finalize())),
                count => hasher.update(&buffer[..count]),
            }
        }
    };
    read().with_context(|| format!("Reading {}", path.display()))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Replaces a file by a rename.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = sibling(path);
    fs::write(&temporary, bytes).with_context(|| format!("Writing {}", temporary.display()))?;
    publish(&temporary, path)
}

/// Puts something finished in its place; a directory replaces the old one.
pub(crate) fn publish(finished: &Path, place: &Path) -> Result<()> {
    if finished.is_dir() && place.exists() {
        fs::remove_dir_all(place).with_context(|| format!("Removing {}", place.display()))?;
    }
    fs::rename(finished, place).with_context(|| format!("Putting {} in place", place.display()))
}

/// Where a file or directory is made before it is put in its place: beside it, empty.
pub(crate) fn sibling(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

/// An empty directory beside `place`, to be published there.
pub(crate) fn fresh_directory(place: &Path) -> Result<PathBuf> {
    let fresh = sibling(place);
    if fresh.exists() {
        fs::remove_dir_all(&fresh).with_context(|| format!("Removing {}", fresh.display()))?;
    }
    fs::create_dir_all(&fresh).with_context(|| format!("Creating {}", fresh.display()))?;
    Ok(fresh)
}

/// Whether `output` exists and was made from this `key`.
pub(crate) fn is_current(output: &Path, key: &str) -> bool {
    output.exists() && fs::read_to_string(stamp_of(output)).is_ok_and(|stamp| stamp == key)
}

/// Records what `output` was made from; call it after the output is in place.
pub(crate) fn record(output: &Path, key: &str) -> Result<()> {
    write(&stamp_of(output), key.as_bytes())
}

fn stamp_of(output: &Path) -> PathBuf {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    output.with_file_name(format!(".{name}.stamp"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_is_sha_256() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest(b""), empty);
    }

    #[test]
    fn output_is_current_only_with_its_own_key() {
        let directory =
            std::env::temp_dir().join(format!("image-build-stamp-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let output = directory.join("output");
        assert!(!is_current(&output, "a"));
        write(&output, b"made").unwrap();
        record(&output, "a").unwrap();
        assert!(is_current(&output, "a"));
        assert!(!is_current(&output, "b"));
        fs::remove_file(&output).unwrap();
        assert!(!is_current(&output, "a"), "the stamp without its output");
        fs::remove_dir_all(&directory).unwrap();
    }
}
