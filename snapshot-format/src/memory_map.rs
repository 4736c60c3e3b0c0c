//! `memory.map`: for every page of a memory, where its content is.
//!
//! A [`MemoryMap`] exists only after everything in it was validated, checksums included; after
//! that, no method can fail or panic on the content. Extents are decoded in place, so opening
//! copies nothing, and a map can be shared between threads.
//!
//! Invariant: extents are sorted, cover the memory without gap or overlap, and lie inside the
//! data of the builds they name.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::build_id::BuildId;
use crate::error::FormatError;
use crate::extent::{EXTENT_BYTES, Extent, record_start};
use crate::extent_check::check_extents;
use crate::map_header::{BuildEntry, HEADER_BYTES, MapHeader, header_crc, parse_builds};
use crate::sys::Mapping;
use crate::top_index::{LINE, TopIndex};
use crate::units::{Generation, PageCount, PageIndex, PageSize};

/// A validated map of one generation of a memory.
#[derive(Debug)]
pub struct MemoryMap {
    bytes: MapBytes,
    name: PathBuf,
    header: MapHeader,
    builds: Vec<BuildEntry>,
    /// Where the extents begin, in bytes.
    extents_at: usize,
    index: TopIndex,
}

#[derive(Debug)]
enum MapBytes {
    Mapped(Mapping),
    Owned(Vec<u8>),
}

impl MapBytes {
    #[inline]
    fn get(&self) -> &[u8] {
        match self {
            Self::Mapped(mapping) => mapping.bytes(),
            Self::Owned(bytes) => bytes,
        }
    }
}

impl MemoryMap {
    /// Maps the file and validates everything in it.
    ///
    /// # Errors
    /// [`FormatError::Io`], [`FormatError::Corrupt`] with the first fault, or
    /// [`FormatError::Unsupported`] for a later format version.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(FormatError::io("Opening", path))?;
        let metadata = file
            .metadata()
            .map_err(FormatError::io("Reading the size of", path))?;
        if metadata.len() < HEADER_BYTES as u64 {
            // An empty file can't be mapped; a short one is refused by the parser.
            let bytes = std::fs::read(path).map_err(FormatError::io("Reading", path))?;
            return Self::from_bytes(bytes, path);
        }
        let mapping = Mapping::of(&file).map_err(FormatError::io("Mapping", path))?;
        Self::validate(MapBytes::Mapped(mapping), path)
    }

    /// Validates a map that is in memory already; `name` is what errors call it.
    ///
    /// # Errors
    /// As for [`MemoryMap::open`].
    pub fn from_bytes(bytes: Vec<u8>, name: &Path) -> Result<Self, FormatError> {
        Self::validate(MapBytes::Owned(bytes), name)
    }

    fn validate(bytes: MapBytes, name: &Path) -> Result<Self, FormatError> {
        let header = MapHeader::parse(bytes.get(), name)?;
        let builds = parse_builds(&header, bytes.get(), name)?;
        let index = check_extents(&header, &builds, bytes.get(), name)?;
        Ok(Self {
            bytes,
            name: name.to_owned(),
            extents_at: header.extents_range().start,
            header,
            builds,
            index,
        })
    }

    /// The build this map belongs to.
    pub fn build_id(&self) -> BuildId {
        self.header.build_id
    }

    /// The build this one is a diff over; `None` for a base.
    pub fn parent(&self) -> Option<BuildId> {
        self.header.parent
    }

    /// How many diffs lie under this build.
    pub fn generation(&self) -> Generation {
        self.header.generation
    }

    /// The page size of the memory and of all data it refers to.
    pub fn page_size(&self) -> PageSize {
        self.header.page_size
    }

    /// The size of the memory.
    pub fn memory_pages(&self) -> PageCount {
        self.header.memory_pages
    }

    /// The builds that extents name by index, ascending by generation; the last is the own one.
    pub fn builds(&self) -> &[BuildEntry] {
        &self.builds
    }

    /// The entry of this build itself.
    pub fn own_build(&self) -> &BuildEntry {
        self.builds
            .last()
            .expect("a validated table ends with its own build")
    }

    /// How many extents describe the memory.
    pub fn extent_count(&self) -> usize {
        self.header.extent_count
    }

    /// The stored checksum of the header, which covers those of the other sections: it identifies
    /// the whole map.
    pub(crate) fn header_crc(&self) -> u32 {
        header_crc(self.bytes.get())
    }

    /// The file, or the name it was given.
    pub fn path(&self) -> &Path {
        &self.name
    }

    /// The bytes of the file.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get()
    }

    /// The whole extent that contains a page; `None` outside the memory.
    #[inline]
    pub fn lookup(&self, page: PageIndex) -> Option<Extent> {
        Some(Extent::decode(self.find(page)?.1))
    }

    /// The extents of a range of pages, clipped to it, with their storage adjusted.
    ///
    /// Pages outside the memory have no extent.
    pub fn extents(&self, range: Range<PageIndex>) -> impl Iterator<Item = Extent> + '_ {
        let position = if range.start < range.end {
            self.position(range.start)
        } else {
            None
        };
        let records = position.map_or(&[] as &[_], |position| &self.records()[position..]);
        records
            .iter()
            .map_while(move |record| Extent::decode(record).clip(&range))
    }

    /// All extents.
    pub fn all_extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.records().iter().map(Extent::decode)
    }

    #[inline]
    fn records(&self) -> &[[u8; EXTENT_BYTES]] {
        self.bytes.get()[self.header.extents_range()].as_chunks().0
    }

    /// The extent of a record; the position is below [`MemoryMap::extent_count`].
    #[inline]
    pub(crate) fn extent_at(&self, position: usize) -> Extent {
        Extent::decode(&self.records()[position])
    }

    /// The position of the record that covers a page.
    #[inline]
    pub(crate) fn position(&self, page: PageIndex) -> Option<usize> {
        Some(self.find(page)?.0)
    }

    /// The record that covers a page, and its position.
    #[inline]
    fn find(&self, page: PageIndex) -> Option<(usize, &[u8; EXTENT_BYTES])> {
        if page.get() >= self.header.memory_pages.get() {
            return None;
        }
        let first = self.index.line_of(page);
        let records = &self.bytes.get()[self.extents_at + first * EXTENT_BYTES..];
        let records = records.as_chunks().0;
        // The records behind the line begin behind the page, so looking at them does no harm;
        // the last lines have none.
        let begun = |line: &[_]| {
            line.iter()
                .filter(|r| record_start(r) <= page.get())
                .count()
        };
        let begun = match records.first_chunk::<LINE>() {
            Some(line) => begun(line),
            None => begun(records),
        };
        Some((first + begun - 1, &records[begun - 1]))
    }
}
