//! Writes the map of a merged build, in little memory however many extents it has.

use std::path::Path;

use crate::checksum::{crc32c_append, mask, masked};
use crate::error::FormatError;
use crate::extent::EXTENT_BYTES;
use crate::map_header::{BUILD_ENTRY_BYTES, BuildEntry, HEADER_BYTES, MapHeader};
use crate::memory_map::MemoryMap;
use crate::merge_plan::merged_extents;
use crate::storage::Storage;

/// How much is written at a time.
const WRITE_BYTES: usize = 1 << 20;

/// Writes the file; `own` is its only build. Returns the number of extents.
pub(crate) fn write_merged_map(
    storage: &dyn Storage,
    path: &Path,
    source: &MemoryMap,
    own: &BuildEntry,
) -> Result<usize, FormatError> {
    let file = storage
        .create_file(path)
        .map_err(FormatError::io("Creating", path))?;
    let write = |at: u64, bytes: &[u8]| {
        let written = storage.write_at(&file, path, at, bytes);
        written.map_err(FormatError::io("Writing", path))
    };
    let extents_at = (HEADER_BYTES + BUILD_ENTRY_BYTES) as u64;
    let (mut records, mut crc, mut written) = (Vec::with_capacity(WRITE_BYTES), 0, 0);
    let mut extents = merged_extents(source);
    loop {
        let extent = extents.next();
        if let Some(extent) = extent {
            extent.encode(&mut records);
        }
        if records.len() >= WRITE_BYTES || extent.is_none() {
            crc = crc32c_append(crc, &records);
            write(extents_at + written, &records)?;
            written += records.len() as u64;
            records.clear();
        }
        if extent.is_none() {
            break;
        }
    }
    let mut table = Vec::with_capacity(BUILD_ENTRY_BYTES);
    own.encode(&mut table);
    let header = MapHeader {
        page_size: source.page_size(),
        generation: own.generation,
        memory_pages: source.memory_pages(),
        build_id: own.id,
        parent: None,
        build_count: 1,
        builds_crc: masked(&table),
        extent_count: usize::try_from(written).expect("a map is addressable") / EXTENT_BYTES,
        extents_crc: mask(crc),
    };
    write(0, &[header.encode().as_slice(), &table].concat())?;
    Ok(header.extent_count)
}
