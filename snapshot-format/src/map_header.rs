//! The fixed header and the build table of `memory.map`, as bytes.
//!
//! `FORMAT.md` draws them. Parsing refuses whatever a writer of this version can't have
//! written, so that all later arithmetic on these numbers is safe: counts agree with the length
//! of the file, and no number of pages exceeds 16 TiB.

use std::ops::Range;
use std::path::Path;

use crate::build_id::BuildId;
use crate::checksum::masked;
use crate::error::{Fault, FormatError};
use crate::extent::EXTENT_BYTES;
use crate::le::{bytes_at, u32_at, u64_at};
use crate::units::{Generation, PageCount, PageSize};

/// The first eight bytes of every map.
pub(crate) const MAGIC: [u8; 8] = *b"THAWMAP\0";
/// The format version of this crate.
pub const FORMAT_VERSION: u32 = 1;
pub(crate) const HEADER_BYTES: usize = 128;
pub(crate) const BUILD_ENTRY_BYTES: usize = 32;
/// The most builds that one map names: an extent's origin has 16 bits and 0 is zero memory.
pub const MAX_BUILDS: usize = 65_535;

const CRC_AT: usize = HEADER_BYTES - 4;
const RESERVED: Range<usize> = 100..CRC_AT;

/// What the fixed header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MapHeader {
    pub(crate) page_size: PageSize,
    pub(crate) generation: Generation,
    pub(crate) memory_pages: PageCount,
    pub(crate) build_id: BuildId,
    pub(crate) parent: Option<BuildId>,
    pub(crate) build_count: usize,
    pub(crate) builds_crc: u32,
    pub(crate) extent_count: usize,
    pub(crate) extents_crc: u32,
}

/// The stored checksum of a map's header; it covers those of the other sections.
///
/// The file is one whose header was parsed.
pub(crate) fn header_crc(file_bytes: &[u8]) -> u32 {
    let header = file_bytes.first_chunk::<HEADER_BYTES>();
    u32_at(header.expect("a parsed map has a header"), CRC_AT)
}

/// A build that a map takes pages from, and what identifies its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuildEntry {
    /// The build.
    pub id: BuildId,
    /// Its generation.
    pub generation: Generation,
    /// The length of its `memory.data` in pages.
    pub data_pages: PageCount,
    /// The header checksum of its `memory.sums`, which identifies all of its data.
    pub sums_crc: u32,
}

impl MapHeader {
    pub(crate) fn builds_range(&self) -> Range<usize> {
        HEADER_BYTES..HEADER_BYTES + self.build_count * BUILD_ENTRY_BYTES
    }

    pub(crate) fn extents_range(&self) -> Range<usize> {
        let start = self.builds_range().end;
        start..start + self.extent_count * EXTENT_BYTES
    }

    /// The 128 bytes, checksum included.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
        let page_bytes = u32::try_from(self.page_size.bytes()).expect("page size fits 32 bits");
        bytes.extend_from_slice(&page_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.generation.get().to_le_bytes());
        bytes.extend_from_slice(&self.memory_pages.get().to_le_bytes());
        bytes.extend_from_slice(self.build_id.as_bytes());
        bytes.extend_from_slice(self.parent.map_or([0; 16], |id| *id.as_bytes()).as_slice());
        let build_count =
            u32::try_from(self.build_count).expect("table has at most 65,535 entries");
        bytes.extend_from_slice(&build_count.to_le_bytes());
        bytes.extend_from_slice(&self.builds_crc.to_le_bytes());
        bytes.extend_from_slice(&(self.builds_range().start as u64).to_le_bytes());
        bytes.extend_from_slice(&(self.extent_count as u64).to_le_bytes());
        bytes.extend_from_slice(&(self.extents_range().start as u64).to_le_bytes());
        bytes.extend_from_slice(&self.extents_crc.to_le_bytes());
        bytes.resize(CRC_AT, 0);
        bytes.extend_from_slice(&masked(&bytes).to_le_bytes());
        bytes.try_into().expect("the fields above fill the header")
    }

    /// Reads and judges the header of a map of which `file_bytes` are all.
    pub(crate) fn parse(file_bytes: &[u8], file: &Path) -> Result<Self, FormatError> {
        let Some(bytes) = file_bytes.first_chunk::<HEADER_BYTES>() else {
            let expected = format!("at least {HEADER_BYTES}");
            return Err(Fault::new(file, 0, "map length", expected, file_bytes.len()).into());
        };
        check_envelope(bytes, file)?;
        let fault = |at: usize, what, expected: &str, found: u64| {
            FormatError::from(Fault::new(file, at as u64, what, expected, found))
        };
        let page_bytes = u64::from(u32_at(bytes, 16));
        let page_size = PageSize::from_bytes(page_bytes)
            .ok_or_else(|| fault(16, "page size", "4096 or 2097152", page_bytes))?;
        let memory_pages = u64_at(bytes, 24);
        let max_pages = page_size.max_memory_pages().get();
        if memory_pages == 0 || memory_pages > max_pages {
            let expected = format!("1 to {max_pages}");
            return Err(fault(24, "memory pages", &expected, memory_pages));
        }
        let build_count = u32_at(bytes, 64) as usize;
        if build_count == 0 || build_count > MAX_BUILDS {
            return Err(fault(64, "build count", "1 to 65535", build_count as u64));
        }
        // Small enough that no later sum or product of counts can overflow.
        let extent_count = u64_at(bytes, 80);
        if extent_count == 0 || extent_count > memory_pages {
            let expected = format!("1 to {memory_pages}");
            return Err(fault(80, "extent count", &expected, extent_count));
        }
        let header = Self {
            page_size,
            generation: Generation::new(u32_at(bytes, 20)),
            memory_pages: PageCount::new(memory_pages),
            build_id: BuildId::from_bytes(bytes_at(bytes, 32)),
            parent: Some(BuildId::from_bytes(bytes_at(bytes, 48))).filter(|id| !id.is_nil()),
            build_count,
            builds_crc: u32_at(bytes, 68),
            extent_count: usize::try_from(extent_count)
                .map_err(|_| fault(80, "extent count", "an addressable number", extent_count))?,
            extents_crc: u32_at(bytes, 96),
        };
        header.check_geometry(bytes, file_bytes.len(), file)?;
        header.check_lineage(file)?;
        Ok(header)
    }

    fn check_geometry(
        &self,
        bytes: &[u8; HEADER_BYTES],
        file_len: usize,
        file: &Path,
    ) -> Result<(), Fault> {
        let (builds, extents) = (self.builds_range(), self.extents_range());
        for (at, what, expected) in [
            (72, "build table offset", builds.start),
            (88, "extents offset", extents.start),
        ] {
            let found = u64_at(bytes, at);
            if found != expected as u64 {
                return Err(Fault::new(file, at as u64, what, expected, found));
            }
        }
        if file_len != extents.end {
            let at = file_len.min(extents.end) as u64;
            return Err(Fault::new(file, at, "map length", extents.end, file_len));
        }
        Ok(())
    }

    fn check_lineage(&self, file: &Path) -> Result<(), Fault> {
        if self.build_id.is_nil() {
            return Err(Fault::new(file, 32, "build id", "an id", "zeros"));
        }
        if self.parent.is_some() != (self.generation > Generation::BASE) {
            let expected = "a parent, or generation 0 without one";
            let found = format!("generation {}", self.generation);
            return Err(Fault::new(file, 48, "parent id", expected, found));
        }
        if self.parent == Some(self.build_id) {
            return Err(Fault::new(
                file,
                48,
                "parent id",
                "another build",
                self.build_id,
            ));
        }
        Ok(())
    }
}

/// Magic, version, checksum, flags and reserved bytes: in that order, so that a file of a later
/// version is reported as such.
fn check_envelope(bytes: &[u8; HEADER_BYTES], file: &Path) -> Result<(), FormatError> {
    if bytes[..8] != MAGIC {
        let found = format!("{:02x?}", &bytes[..8]);
        return Err(Fault::new(file, 0, "magic", format!("{MAGIC:02x?}"), found).into());
    }
    let (stored, computed) = (u32_at(bytes, CRC_AT), masked(&bytes[..CRC_AT]));
    let version = u32_at(bytes, 8);
    if version != FORMAT_VERSION {
        return Err(FormatError::Unsupported {
            file: file.to_owned(),
            what: "format version",
            found: version.into(),
        });
    }
    if stored != computed {
        return Err(Fault::checksum(file, 0, "header checksum", stored, computed).into());
    }
    let flags = u32_at(bytes, 12);
    if flags != 0 {
        return Err(FormatError::Unsupported {
            file: file.to_owned(),
            what: "flags",
            found: flags.into(),
        });
    }
    if bytes[RESERVED].iter().any(|&byte| byte != 0) {
        let at = RESERVED.start as u64;
        return Err(Fault::new(file, at, "reserved bytes", "zeros", "other bytes").into());
    }
    Ok(())
}

impl BuildEntry {
    /// Appends the 32 bytes of this entry.
    pub(crate) fn encode(&self, table: &mut Vec<u8>) {
        table.extend_from_slice(self.id.as_bytes());
        table.extend_from_slice(&self.data_pages.get().to_le_bytes());
        table.extend_from_slice(&self.generation.get().to_le_bytes());
        table.extend_from_slice(&self.sums_crc.to_le_bytes());
    }

    fn decode(entry: &[u8; BUILD_ENTRY_BYTES]) -> Self {
        Self {
            id: BuildId::from_bytes(bytes_at(entry, 0)),
            data_pages: PageCount::new(u64_at(entry, 16)),
            generation: Generation::new(u32_at(entry, 24)),
            sums_crc: u32_at(entry, 28),
        }
    }
}

/// Reads and judges the build table of a map whose header is good.
pub(crate) fn parse_builds(
    header: &MapHeader,
    file_bytes: &[u8],
    file: &Path,
) -> Result<Vec<BuildEntry>, Fault> {
    let table = &file_bytes[header.builds_range()];
    let computed = masked(table);
    if computed != header.builds_crc {
        let (at, stored) = (HEADER_BYTES as u64, header.builds_crc);
        return Err(Fault::checksum(
            file,
            at,
            "build table checksum",
            stored,
            computed,
        ));
    }
    let builds: Vec<_> = table.as_chunks().0.iter().map(BuildEntry::decode).collect();
    let at = |index: usize| (HEADER_BYTES + index * BUILD_ENTRY_BYTES) as u64;
    let max_pages = header.page_size.max_memory_pages();
    for (index, build) in builds.iter().enumerate() {
        if build.id.is_nil() {
            return Err(Fault::new(file, at(index), "build id", "an id", "zeros"));
        }
        if build.data_pages > max_pages {
            let (at, expected) = (at(index) + 16, format!("at most {max_pages}"));
            return Err(Fault::new(
                file,
                at,
                "data pages",
                expected,
                build.data_pages,
            ));
        }
        if index > 0 && build.generation <= builds[index - 1].generation {
            let expected = format!("more than {}", builds[index - 1].generation);
            let (at, found) = (at(index) + 24, build.generation);
            return Err(Fault::new(file, at, "build generation", expected, found));
        }
    }
    let own = builds.len() - 1;
    if builds[own].id != header.build_id || builds[own].generation != header.generation {
        let expected = format!("{} of generation {}", header.build_id, header.generation);
        let found = format!(
            "{} of generation {}",
            builds[own].id, builds[own].generation
        );
        return Err(Fault::new(file, at(own), "last build", expected, found));
    }
    let mut ids: Vec<_> = builds.iter().map(|build| build.id).collect();
    ids.sort_unstable();
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        let (at, found) = (HEADER_BYTES as u64, format!("{} twice", pair[0]));
        return Err(Fault::new(
            file,
            at,
            "build table",
            "distinct builds",
            found,
        ));
    }
    Ok(builds)
}
