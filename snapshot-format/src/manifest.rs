//! `manifest.json`: what a build is, and the length and checksum of each of its files.
//!
//! The last member of the object is `checksum`: the CRC-32C of all bytes of the file before its
//! eight digits. What follows the digits is fixed, so any change to the file is found without
//! parsing it. Readers of this version refuse members they don't know.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::build_id::BuildId;
use crate::checksum::crc32c;
use crate::error::{Fault, FormatError};
use crate::map_header::FORMAT_VERSION;
use crate::units::{Generation, PageCount, PageSize};

/// The names of the files that the format itself knows.
pub mod file_name {
    /// The manifest; the only file it doesn't list.
    pub const MANIFEST: &str = "manifest.json";
    /// Where each page is.
    pub const MAP: &str = "memory.map";
    /// The pages of this generation.
    pub const DATA: &str = "memory.data";
    /// The checksums of the pages.
    pub const SUMS: &str = "memory.sums";
    /// The VMM's own state file.
    pub const VMSTATE: &str = "vmstate";
    /// The disk.
    pub const ROOTFS: &str = "rootfs.img";
    /// Instead of a whole disk: what it was made over, which other builds have, too.
    pub const ROOTFS_BASE: &str = "rootfs.base";
    /// And what was changed of it, as device-mapper's snapshots store it.
    pub const ROOTFS_COW: &str = "rootfs.cow";
    /// Recorded after the build was published: the only file that may appear later.
    pub const WORKING_SET: &str = "working-set";
}

/// The largest manifest that is read.
pub const MAX_MANIFEST_BYTES: u64 = 1 << 20;
const MAX_NAME_BYTES: usize = 64;
/// What follows the digits of the checksum, to the end of the file.
const TAIL: &str = "\"\n}\n";
const DIGITS: usize = 8;

/// What a build is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format_version: u32,
    /// The build; also the name of its directory.
    pub build_id: BuildId,
    /// The build this one is a diff over; `null` for a base.
    pub parent: Option<BuildId>,
    /// How many diffs lie under this build.
    pub generation: Generation,
    /// When it was published, in milliseconds since 1970, as the publisher's clock said.
    pub created_at_ms: u64,
    /// The geometry of its memory.
    pub memory: MemoryShape,
    /// The VMM that wrote `vmstate`: its name, version, CPU; free text for the publisher.
    pub vmm: BTreeMap<String, String>,
    /// Whatever else the publisher needs to know again: vCPU count, kernel, template.
    pub labels: BTreeMap<String, String>,
    /// Every other file of the build.
    pub files: BTreeMap<String, FileEntry>,
    checksum: String,
}

/// The geometry of a memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryShape {
    /// The page size, in bytes when serialised.
    pub page_size: PageSize,
    /// The size of the memory in pages.
    pub pages: PageCount,
}

/// What the manifest says about a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its length.
    pub bytes: u64,
    /// The CRC-32C of its content, in which holes are zeros; absent for `memory.data` alone,
    /// whose checksums are in `memory.sums`.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "hex")]
    pub crc32c: Option<u32>,
}

#[derive(Deserialize)]
struct VersionOnly {
    format_version: u32,
}

impl Manifest {
    pub(crate) fn new(
        build_id: BuildId,
        (parent, generation): (Option<BuildId>, Generation),
        memory: MemoryShape,
        info: crate::staging::PublishInfo,
        files: BTreeMap<String, FileEntry>,
    ) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            build_id,
            parent,
            generation,
            created_at_ms: info.created_at_ms,
            memory,
            vmm: info.vmm,
            labels: info.labels,
            files,
            checksum: "0".repeat(DIGITS),
        }
    }

    /// Reads and judges a manifest.
    ///
    /// # Errors
    /// [`FormatError::Io`], [`FormatError::Corrupt`], [`FormatError::Unsupported`] or
    /// [`FormatError::ManifestTooLarge`].
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(FormatError::io("Opening", path))?;
        let mut bytes = Vec::new();
        file.take(MAX_MANIFEST_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(FormatError::io("Reading", path))?;
        Self::from_bytes(&bytes, path)
    }

    /// Judges a manifest that is in memory; `name` is what errors call it.
    ///
    /// # Errors
    /// As for [`Manifest::open`], without I/O.
    pub fn from_bytes(bytes: &[u8], name: &Path) -> Result<Self, FormatError> {
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            let bytes = bytes.len() as u64;
            return Err(FormatError::ManifestTooLarge { bytes });
        }
        let syntax = |error: serde_json::Error| {
            Fault::new(name, 0, "manifest", "a manifest of format version 1", error)
        };
        // The version first: a later one may keep its checksum elsewhere.
        if let Ok(VersionOnly { format_version }) = serde_json::from_slice(bytes)
            && format_version != FORMAT_VERSION
        {
            return Err(FormatError::Unsupported {
                file: name.to_owned(),
                what: "format version",
                found: format_version.into(),
            });
        }
        check_checksum(bytes, name)?;
        let manifest: Self = serde_json::from_slice(bytes).map_err(syntax)?;
        manifest.check_files(name)?;
        Ok(manifest)
    }

    /// The file.
    ///
    /// # Errors
    /// [`FormatError::ManifestTooLarge`], if the publisher's labels are too long.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        let mut text = serde_json::to_string_pretty(self)
            .expect("a manifest has only string keys and plain values");
        text.push('\n');
        let digits = text.len() - TAIL.len() - DIGITS;
        debug_assert!(text.ends_with(TAIL), "`checksum` is the last member");
        let crc = crc32c(&text.as_bytes()[..digits]);
        text.replace_range(digits..digits + DIGITS, &format!("{crc:08x}"));
        let bytes = text.len() as u64;
        if bytes > MAX_MANIFEST_BYTES {
            return Err(FormatError::ManifestTooLarge { bytes });
        }
        Ok(text.into_bytes())
    }

    fn check_files(&self, name: &Path) -> Result<(), Fault> {
        for required in [file_name::MAP, file_name::DATA, file_name::SUMS] {
            if !self.files.contains_key(required) {
                return Err(Fault::new(name, 0, "file list", required, "no entry"));
            }
        }
        for (file, entry) in &self.files {
            if check_name(file).is_err() {
                return Err(Fault::new(name, 0, "file name", "a plain name", file));
            }
            if entry.crc32c.is_some() == (file == file_name::DATA) {
                let expected = "a checksum for every file but memory.data";
                return Err(Fault::new(name, 0, "file entry", expected, file));
            }
        }
        Ok(())
    }
}

fn check_checksum(bytes: &[u8], name: &Path) -> Result<(), Fault> {
    let Some(digits) = bytes.len().checked_sub(TAIL.len() + DIGITS) else {
        return Err(Fault::new(
            name,
            0,
            "manifest length",
            "a manifest",
            bytes.len(),
        ));
    };
    let (covered, rest) = bytes.split_at(digits);
    let expected = format!("{:08x}", crc32c(covered));
    let (stored, tail) = rest.split_at(DIGITS);
    if stored != expected.as_bytes() {
        let found = String::from_utf8_lossy(stored);
        return Err(Fault::new(
            name,
            digits as u64,
            "manifest checksum",
            expected,
            found,
        ));
    }
    if tail != TAIL.as_bytes() {
        let (at, found) = ((digits + DIGITS) as u64, format!("{tail:02x?}"));
        return Err(Fault::new(
            name,
            at,
            "end of the manifest",
            "quote, brace",
            found,
        ));
    }
    Ok(())
}

/// Refuses a name that could leave the build's directory or be taken for something else.
pub(crate) fn check_name(name: &str) -> Result<(), FormatError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    let good = name.len() <= MAX_NAME_BYTES
        && name.bytes().all(plain)
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name != file_name::MANIFEST
        && name != file_name::WORKING_SET;
    if good {
        Ok(())
    } else {
        let name = name.to_owned();
        Err(FormatError::FileName { name })
    }
}

/// A checksum as eight lowercase hexadecimal digits.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(crc: &Option<u32>, to: S) -> Result<S::Ok, S::Error> {
        match crc {
            Some(crc) => to.collect_str(&format_args!("{crc:08x}")),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
        let text = String::deserialize(from)?;
        let crc = u32::from_str_radix(&text, 16).ok();
        match crc.filter(|crc| format!("{crc:08x}") == text) {
            None => Err(serde::de::Error::custom(
                "checksum is not 8 lowercase hexadecimal digits",
            )),
            crc => Ok(crc),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "/a",
            "-a",
            ".hidden",
            "manifest.json",
            "a\0",
            "ä",
        ] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        for name in ["vmstate", "rootfs.img", "memory.data", "a-b_c.1"] {
            assert!(check_name(name).is_ok(), "{name:?}");
        }
    }
}
