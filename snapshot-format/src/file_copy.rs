//! Copies a file of a build into another one, with its holes, and compares it with what the
//! manifest says.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::checksum::{append_zeros, crc32c_append};
use crate::error::{Fault, FormatError};
use crate::manifest::FileEntry;
use crate::sparse::{READ_BYTES, file_checksum, next_data};
use crate::storage::Storage;

/// Makes `to` a copy of `from`, which is what `entry` says. If `to` already is, it stays.
pub(crate) fn copy_file(
    storage: &dyn Storage,
    from: &Path,
    to: &Path,
    entry: &FileEntry,
) -> Result<(), FormatError> {
    if let Some(crc) = entry.crc32c
        && file_checksum(to).is_ok_and(|found| found == (entry.bytes, crc))
    {
        return Ok(());
    }
    let source = File::open(from).map_err(FormatError::io("Opening", from))?;
    let target = storage
        .create_file(to)
        .map_err(FormatError::io("Creating", to))?;
    target
        .set_len(entry.bytes)
        .map_err(FormatError::io("Growing", to))?;
    let (mut crc, mut at) = (0, 0);
    let mut buffer = Vec::new();
    while at < entry.bytes {
        let data = next_data(&source, at, entry.bytes)
            .map_err(FormatError::io("Seeking in", from))?
            .unwrap_or(entry.bytes..entry.bytes);
        crc = append_zeros(crc, data.start - at);
        at = data.start;
        while at < data.end {
            let bytes = (data.end - at).min(READ_BYTES as u64);
            buffer.resize(usize::try_from(bytes).expect("a read is small"), 0);
            source
                .read_exact_at(&mut buffer, at)
                .map_err(FormatError::io("Reading", from))?;
            crc = crc32c_append(crc, &buffer);
            storage
                .write_at(&target, to, at, &buffer)
                .map_err(FormatError::io("Writing", to))?;
            at += bytes;
        }
    }
    match entry.crc32c {
        Some(expected) if expected != crc => {
            Err(Fault::checksum(from, 0, "file checksum", expected, crc).into())
        }
        _ => Ok(()),
    }
}
