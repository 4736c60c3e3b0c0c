//! The bytes of a new `memory.map`.

use crate::build_id::BuildId;
use crate::checksum::masked;
use crate::extent::{EXTENT_BYTES, Extent};
use crate::map_header::{BUILD_ENTRY_BYTES, BuildEntry, HEADER_BYTES, MapHeader};
use crate::units::{PageCount, PageSize};

/// What a map says, before it is bytes.
#[derive(Debug)]
pub(crate) struct MapContent<'a> {
    pub(crate) page_size: PageSize,
    pub(crate) memory_pages: PageCount,
    pub(crate) parent: Option<BuildId>,
    /// Ascending by generation, the own build last.
    pub(crate) builds: &'a [BuildEntry],
    /// Complete and sorted.
    pub(crate) extents: &'a [Extent],
}

/// The file for this content.
pub(crate) fn encode_map(content: &MapContent<'_>) -> Vec<u8> {
    let own = content
        .builds
        .last()
        .expect("a table ends with its own build");
    let table_bytes = content.builds.len() * BUILD_ENTRY_BYTES;
    let records_at = HEADER_BYTES + table_bytes;
    let mut file = Vec::with_capacity(records_at + content.extents.len() * EXTENT_BYTES);
    // The header has the checksums of what is behind it.
    file.resize(HEADER_BYTES, 0);
    content
        .builds
        .iter()
        .for_each(|build| build.encode(&mut file));
    content
        .extents
        .iter()
        .for_each(|extent| extent.encode(&mut file));

    let header = MapHeader {
        page_size: content.page_size,
        generation: own.generation,
        memory_pages: content.memory_pages,
        build_id: own.id,
        parent: content.parent,
        build_count: content.builds.len(),
        builds_crc: masked(&file[HEADER_BYTES..records_at]),
        extent_count: (file.len() - records_at) / EXTENT_BYTES,
        extents_crc: masked(&file[records_at..]),
    };
    file[..HEADER_BYTES].copy_from_slice(&header.encode());
    file
}
