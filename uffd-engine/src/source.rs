//! Where a session's pages come from: the data files of a build, each mapped (for
//! what the page cache holds) and open for direct reads (for what it doesn't).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use snapshot_format::{Build, BuildId, BuildStore, Extent, MemoryMap, Origin, PageIndex};
use thiserror::Error;

use crate::sys::mapping::SourceMapping;
use crate::sys::uffd::SourceAddr;

/// Why a build can't be served.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The build is missing, incomplete or corrupt.
    #[error("Opening build {id}")]
    Build {
        /// Which build.
        id: BuildId,
        /// What is wrong with it.
        #[source]
        source: snapshot_format::FormatError,
    },
    /// The build has pages of a size that workers don't serve.
    #[error("Build {id} has pages of {bytes} bytes; only 4096 are served")]
    PageSize {
        /// Which build.
        id: BuildId,
        /// Bytes of its pages.
        bytes: u64,
    },
    /// A data file could not be mapped.
    #[error("Mapping {}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// One build, ready to be read page by page. Cheap to share between sessions.
#[derive(Debug)]
pub struct PageSource {
    build: Build,
    files: Vec<SourceFile>,
}

#[derive(Debug)]
struct SourceFile {
    mapping: Option<SourceMapping>,
    direct: File,
}

impl PageSource {
    /// Opens a build and everything it refers to.
    ///
    /// # Errors
    /// See [`SourceError`].
    pub fn open(store: &BuildStore, id: BuildId) -> Result<Arc<Self>, SourceError> {
        let build = store
            .open(&id)
            .map_err(|source| SourceError::Build { id, source })?;
        let page_bytes = build.map().page_size().bytes();
        let mut files = Vec::with_capacity(build.data_files().len());
        for file in build.data_files() {
            let failed = |source| SourceError::Map {
                path: file.path().to_path_buf(),
                source,
            };
            let bytes = file.pages().get() * page_bytes;
            let mapping = match bytes {
                0 => None,
                len => Some(SourceMapping::new(file.file(), len).map_err(failed)?),
            };
            files.push(SourceFile {
                mapping,
                direct: open_direct(file.path()).map_err(failed)?,
            });
        }
        Ok(Arc::new(Self { build, files }))
    }

    /// The map that says where each page lies.
    #[must_use]
    pub fn map(&self) -> &MemoryMap {
        self.build.map()
    }

    /// The extent that holds a page.
    ///
    /// # Panics
    /// The page is outside the memory: a validated map covers all of it.
    #[must_use]
    pub fn extent(&self, page: PageIndex) -> Extent {
        self.map()
            .lookup(page)
            .expect("a validated map covers every page of the memory")
    }

    /// Where `page` of this extent lies: which file, at which byte.
    ///
    /// # Panics
    /// The extent has no storage (its origin is zero).
    #[must_use]
    pub fn locate(&self, extent: Extent, page: PageIndex) -> Location {
        let Origin::Build(file) = extent.origin else {
            panic!("a zero page has no location")
        };
        let into = page.get() - extent.start.get();
        let offset = (extent.storage.get() + into) * self.map().page_size().bytes();
        Location { file, offset }
    }

    /// How many of `len` bytes at a location are in the page cache now, and the address
    /// to copy them from.
    #[must_use]
    pub fn resident(&self, at: Location, len: u64) -> (SourceAddr, u64) {
        let mapping = self.files[usize::from(at.file)]
            .mapping
            .as_ref()
            .expect("an extent never points into an empty file");
        (
            mapping.source(at.offset, len),
            mapping.resident_prefix(at.offset, len),
        )
    }

    /// The descriptor to read a location from without the page cache.
    #[must_use]
    pub fn direct(&self, at: Location) -> BorrowedFd<'_> {
        self.files[usize::from(at.file)].direct.as_fd()
    }
}

/// A place in a build's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Index into the map's build table.
    pub file: u16,
    /// Byte offset in that build's data file.
    pub offset: u64,
}

/// Opens for reads that bypass the page cache; file systems without such reads (older
/// tmpfs) are read through it.
fn open_direct(path: &std::path::Path) -> io::Result<File> {
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path);
    match direct {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => File::open(path),
        other => other,
    }
}
