//! One published build, opened: manifest, map, and the data of every build the map refers to.
//!
//! Opening validates the manifest, the whole map, and that each ancestor is the one the map was
//! written against. It reads no pages: their checksums are for [`verify`](crate::verify) and for
//! readers off the hot path.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::build_id::BuildId;
use crate::data_file::DataFile;
use crate::encoding::Encoding;
use crate::error::{Fault, FormatError};
use crate::extent::Origin;
use crate::manifest::{Manifest, file_name};
use crate::memory_map::MemoryMap;
use crate::sums::DataSums;
use crate::units::{PageCount, PageIndex};

/// An opened build. Clones share everything.
#[derive(Clone, Debug)]
pub struct Build {
    dir: PathBuf,
    manifest: Arc<Manifest>,
    map: Arc<MemoryMap>,
    data_files: Arc<[DataFile]>,
}

impl Build {
    /// Opens the build `id` of the store at `root`, if all data it refers to can be read where
    /// its map says.
    pub(crate) fn open_served(root: &Path, id: BuildId) -> Result<Self, FormatError> {
        let build = Self::open(root, id)?;
        let cold = build
            .data_files
            .iter()
            .find(|data| data.encoding() != Encoding::Raw);
        match cold {
            None => Ok(build),
            Some(data) => Err(FormatError::Cold {
                build_id: id,
                ancestor: data.build_id(),
                encoding: data.encoding(),
            }),
        }
    }

    /// Opens the build `id` of the store at `root`.
    pub(crate) fn open(root: &Path, id: BuildId) -> Result<Self, FormatError> {
        let dir = root.join(id.to_string());
        if !dir.is_dir() {
            return Err(FormatError::NotFound { build_id: id });
        }
        let manifest_path = dir.join(file_name::MANIFEST);
        let manifest = Manifest::open(&manifest_path)?;
        let map = MemoryMap::open(&dir.join(file_name::MAP))?;
        if let Some(fault) = disagreement(&manifest_path, id, &manifest, &map) {
            return Err(fault.into());
        }
        check_lengths(&dir, &manifest)?;
        let data_files = DataFile::open_all(root, &dir, &map)?;
        Ok(Self {
            dir,
            manifest: Arc::new(manifest),
            map: Arc::new(map),
            data_files: data_files.into(),
        })
    }

    /// Its id.
    pub fn id(&self) -> BuildId {
        self.manifest.build_id
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its map.
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// Its map, to keep.
    pub fn shared_map(&self) -> Arc<MemoryMap> {
        Arc::clone(&self.map)
    }

    /// The data of every build in [`MemoryMap::builds`], in the same order.
    pub fn data_files(&self) -> &[DataFile] {
        &self.data_files
    }

    /// Reads the checksums of this build's own data.
    ///
    /// # Errors
    /// [`FormatError::Io`], [`FormatError::Corrupt`] or [`FormatError::Unsupported`].
    pub fn sums(&self) -> Result<DataSums, FormatError> {
        DataSums::open(&self.dir.join(file_name::SUMS))
    }

    /// Reads one page; for tools and comparison, not for the fault path.
    ///
    /// # Errors
    /// As for [`Build::read_range`]; [`FormatError::PartialPage`] also for more than one page.
    pub fn read_page(&self, page: PageIndex, buffer: &mut [u8]) -> Result<(), FormatError> {
        let (bytes, page_size) = (buffer.len() as u64, self.map.page_size());
        if bytes != page_size.bytes() {
            return Err(FormatError::PartialPage { bytes, page_size });
        }
        self.read_range(page, buffer)
    }

    /// Reads as many pages as `buffer` holds, from `start` on.
    ///
    /// # Errors
    /// [`FormatError::PartialPage`], [`FormatError::OutsideMemory`] or [`FormatError::Io`].
    pub fn read_range(&self, start: PageIndex, buffer: &mut [u8]) -> Result<(), FormatError> {
        let page_size = self.map.page_size();
        let bytes = buffer.len() as u64;
        if !bytes.is_multiple_of(page_size.bytes()) {
            return Err(FormatError::PartialPage { bytes, page_size });
        }
        let pages = PageCount::new(bytes / page_size.bytes());
        let memory_pages = self.map.memory_pages();
        let end = start
            .checked_add(pages)
            .filter(|end| end.get() <= memory_pages.get())
            .ok_or(FormatError::OutsideMemory {
                start,
                pages,
                memory_pages,
            })?;
        let mut rest = buffer;
        for extent in self.map.extents(start..end) {
            let bytes = DataFile::offset(PageIndex::new(extent.pages.get()), page_size);
            let bytes = usize::try_from(bytes).expect("a part of the buffer fits memory");
            let (part, behind) = rest.split_at_mut(bytes);
            match extent.origin {
                Origin::Zero => part.fill(0),
                Origin::Build(index) => {
                    let data = &self.data_files[usize::from(index)];
                    data.read_bytes(part, DataFile::offset(extent.storage, page_size))?;
                }
            }
            rest = behind;
        }
        Ok(())
    }
}

/// The first thing about which the manifest disagrees with the map or the directory's name.
pub(crate) fn disagreement(
    path: &Path,
    id: BuildId,
    manifest: &Manifest,
    map: &MemoryMap,
) -> Option<Fault> {
    let none = || "none".to_owned();
    let parent = |id: Option<BuildId>| id.map_or_else(none, |id| id.to_string());
    let (own, memory) = (manifest.build_id, manifest.memory);
    let compared = [
        ("build id, by directory", id.to_string(), own.to_string()),
        (
            "build id, by map",
            map.build_id().to_string(),
            own.to_string(),
        ),
        (
            "parent, by map",
            parent(map.parent()),
            parent(manifest.parent),
        ),
        (
            "generation, by map",
            map.generation().to_string(),
            manifest.generation.to_string(),
        ),
        (
            "page size, by map",
            map.page_size().to_string(),
            memory.page_size.to_string(),
        ),
        (
            "memory pages, by map",
            map.memory_pages().to_string(),
            memory.pages.to_string(),
        ),
    ];
    compared
        .into_iter()
        .find(|(_, expected, found)| expected != found)
        .map(|(what, expected, found)| Fault::new(path, 0, what, expected, found))
}

/// Refuses a build of which a file is missing or has another length than the manifest says.
fn check_lengths(dir: &Path, manifest: &Manifest) -> Result<(), FormatError> {
    for (name, entry) in &manifest.files {
        let path = dir.join(name);
        let metadata =
            std::fs::metadata(&path).map_err(FormatError::io("Reading the size of", &path))?;
        if metadata.len() != entry.bytes {
            let at = metadata.len().min(entry.bytes);
            return Err(Fault::new(&path, at, "file length", entry.bytes, metadata.len()).into());
        }
    }
    Ok(())
}
