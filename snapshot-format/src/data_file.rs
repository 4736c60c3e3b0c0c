//! An opened `memory.data`, known to be the one that a map was written against.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::build_id::BuildId;
use crate::chunk_table::ChunkTable;
use crate::encoding::Encoding;
use crate::error::{Fault, FormatError};
use crate::manifest::file_name;
use crate::map_header::BuildEntry;
use crate::memory_map::MemoryMap;
use crate::sums::SumsHeader;
use crate::units::{PageCount, PageIndex, PageSize};

/// The pages of one build.
#[derive(Debug)]
pub struct DataFile {
    file: File,
    path: PathBuf,
    build_id: BuildId,
    pages: PageCount,
    /// If the file is encoded.
    table: Option<ChunkTable>,
}

impl DataFile {
    /// The file, opened for reading. Pages are where extents say only if it is not encoded.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The build it belongs to.
    pub fn build_id(&self) -> BuildId {
        self.build_id
    }

    /// How the file is stored. Only builds that were opened with
    /// [`BuildStore::open_cold`](crate::BuildStore::open_cold) have others than
    /// [`Encoding::Raw`].
    pub fn encoding(&self) -> Encoding {
        self.table
            .as_ref()
            .map_or(Encoding::Raw, ChunkTable::encoding)
    }

    /// The length of the file, as its sums say.
    pub(crate) fn stored_bytes(&self, page_size: PageSize) -> u64 {
        let raw = || Self::offset(PageIndex::new(self.pages.get()), page_size);
        self.table
            .as_ref()
            .map_or_else(raw, ChunkTable::stored_bytes)
    }

    /// How many pages it has.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// Reads a part of the data.
    pub(crate) fn read_bytes(&self, buffer: &mut [u8], at: u64) -> Result<(), FormatError> {
        if let Some(table) = &self.table {
            return table.read(&self.file, &self.path, buffer, at);
        }
        self.file
            .read_exact_at(buffer, at)
            .map_err(FormatError::io("Reading", &self.path))
    }

    /// Opens the data of a build in `dir`, checks its length, and that its sums are those that
    /// `entry` names.
    fn open(dir: &Path, entry: &BuildEntry, page_size: PageSize) -> Result<Self, OpenError> {
        let sums_path = dir.join(file_name::SUMS);
        let sums = SumsHeader::open(&sums_path)?;
        if sums.header_crc != entry.sums_crc || sums.build_id != entry.id {
            return Err(OpenError::Changed {
                found: sums.header_crc,
            });
        }
        let expected = entry.data_pages.bytes(page_size);
        if expected != Some(sums.data_bytes) {
            let expected = format!("{} pages", entry.data_pages);
            let fault = Fault::new(&sums_path, 24, "data length", expected, sums.data_bytes);
            return Err(FormatError::from(fault).into());
        }
        let table = match sums.encoding {
            Encoding::Raw => None,
            Encoding::Lz4 | Encoding::Zstd => Some(ChunkTable::open(&sums_path, &sums)?),
        };
        let stored_bytes = table
            .as_ref()
            .map_or(sums.data_bytes, ChunkTable::stored_bytes);
        let path = dir.join(file_name::DATA);
        let file = File::open(&path).map_err(FormatError::io("Opening", &path))?;
        let metadata = file
            .metadata()
            .map_err(FormatError::io("Reading the size of", &path))?;
        if metadata.len() < stored_bytes {
            let expected = format!("at least {stored_bytes}");
            let at = metadata.len();
            let fault = Fault::new(&path, at, "data length", expected, metadata.len());
            return Err(FormatError::from(fault).into());
        }
        Ok(Self {
            file,
            path,
            build_id: entry.id,
            pages: entry.data_pages,
            table,
        })
    }

    /// Opens the data of every build in a map's table, in its order; `own_dir` is where the
    /// map's own build is, the others are in the store at `root`.
    pub(crate) fn open_all(
        root: &Path,
        own_dir: &Path,
        map: &MemoryMap,
    ) -> Result<Vec<Self>, FormatError> {
        let open = |entry: &BuildEntry| {
            if entry.id == map.build_id() {
                Self::open_in(own_dir, entry, map)
            } else {
                Self::open_in(&root.join(entry.id.to_string()), entry, map)
            }
        };
        map.builds().iter().map(open).collect()
    }

    /// Opens the data of one build in a map's table, which is in `dir`.
    pub(crate) fn open_in(
        dir: &Path,
        entry: &BuildEntry,
        map: &MemoryMap,
    ) -> Result<Self, FormatError> {
        let (build_id, ancestor) = (map.build_id(), entry.id);
        Self::open(dir, entry, map.page_size()).map_err(|error| match error {
            OpenError::Changed { found } => FormatError::AncestorChanged {
                build_id,
                ancestor,
                expected: entry.sums_crc,
                found,
            },
            OpenError::Format(FormatError::Io { source, .. })
                if ancestor != build_id && source.kind() == io::ErrorKind::NotFound =>
            {
                FormatError::AncestorMissing { build_id, ancestor }
            }
            OpenError::Format(error) => error,
        })
    }

    /// Where a page begins; for pages of extents that were validated against this file.
    pub(crate) fn offset(page: PageIndex, page_size: PageSize) -> u64 {
        page.byte_offset(page_size)
            .expect("validated storage pages lie inside 16 TiB")
            .get()
    }
}

enum OpenError {
    Changed { found: u32 },
    Format(FormatError),
}

impl From<FormatError> for OpenError {
    fn from(error: FormatError) -> Self {
        Self::Format(error)
    }
}
