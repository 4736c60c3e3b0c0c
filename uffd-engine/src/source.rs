//! Where a session's pages come from: the data files of a build, each mapped (for
//! what the page cache holds) and open for direct reads (for what it doesn't).
//!
//! Or one plain memory file, as Firecracker's `snapshot/create` writes it: then its data is
//! one extent after the other and its holes are zero.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};
use snapshot_format::{Build, BuildId, BuildStore, Extent, Origin, PageCount, PageIndex, PageSize};
use thiserror::Error;

use crate::plain_file::PlainFile;
use crate::sys::mapping::{ChunkBits, SourceMapping};
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
    memory: Memory,
    files: Vec<SourceFile>,
    serial: u32,
}

/// What says where a page lies.
#[derive(Debug)]
enum Memory {
    Build(Build),
    Plain(PlainFile),
}

/// Tells one opened source from all others of this process.
static NEXT_SERIAL: AtomicU32 = AtomicU32::new(1);

#[derive(Debug)]
struct SourceFile {
    mapping: Option<SourceMapping>,
    direct: File,
    may_block: bool,
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
            let bytes = file.pages().get() * page_bytes;
            files.push(SourceFile::open(file.path(), file.file(), bytes)?);
        }
        Ok(Self::new(Memory::Build(build), files))
    }

    /// Opens a plain memory file, byte `n` of which is byte `n` of the memory.
    ///
    /// # Errors
    /// [`SourceError::Map`] when it can't be read or holds no whole number of pages.
    pub fn open_plain(path: &Path, page_size: PageSize) -> Result<Arc<Self>, SourceError> {
        let failed = |source| SourceError::Map {
            path: path.to_path_buf(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let plain = PlainFile::read(&file, page_size).map_err(failed)?;
        let files = vec![SourceFile::open(path, &file, plain.bytes())?];
        Ok(Self::new(Memory::Plain(plain), files))
    }

    fn new(memory: Memory, files: Vec<SourceFile>) -> Arc<Self> {
        let serial = NEXT_SERIAL.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self {
            memory,
            files,
            serial,
        })
    }

    /// The build, unless this is a plain file.
    #[must_use]
    pub fn build(&self) -> Option<&Build> {
        match &self.memory {
            Memory::Build(build) => Some(build),
            Memory::Plain(_) => None,
        }
    }

    /// The size of its pages.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        match &self.memory {
            Memory::Build(build) => build.map().page_size(),
            Memory::Plain(plain) => plain.page_size(),
        }
    }

    /// How many pages the memory has.
    #[must_use]
    pub fn memory_pages(&self) -> PageCount {
        match &self.memory {
            Memory::Build(build) => build.map().memory_pages(),
            Memory::Plain(plain) => plain.pages(),
        }
    }

    /// Tells this source from every other that this process opens.
    pub(crate) fn serial(&self) -> u32 {
        self.serial
    }

    /// How many data files it has.
    pub(crate) fn file_count(&self) -> usize {
        self.files.len()
    }

    /// The extent that holds a page.
    ///
    /// # Panics
    /// The page is outside the memory: a validated map covers all of it.
    #[must_use]
    pub fn extent(&self, page: PageIndex) -> Extent {
        let extent = match &self.memory {
            Memory::Build(build) => build.map().lookup(page),
            Memory::Plain(plain) => plain.lookup(page),
        };
        extent.expect("a validated map covers every page of the memory")
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
        let offset = (extent.storage.get() + into) * self.page_size().bytes();
        Location { file, offset }
    }

    /// The address to copy `len` bytes at a location from.
    #[must_use]
    pub fn address(&self, at: Location, len: u64) -> SourceAddr {
        self.mapping(at.file).source(at.offset, len)
    }

    /// Which pages of a chunk of a data file are in the page cache now.
    #[must_use]
    pub(crate) fn look_at_chunk(&self, file: u16, chunk: u64) -> ChunkBits {
        self.mapping(file).look_at_chunk(chunk)
    }

    fn mapping(&self, file: u16) -> &SourceMapping {
        let mapping = self.files[usize::from(file)].mapping.as_ref();
        mapping.expect("an extent never points into an empty file")
    }

    /// The descriptor to read a location from without the page cache.
    #[must_use]
    pub fn direct(&self, at: Location) -> BorrowedFd<'_> {
        self.files[usize::from(at.file)].direct.as_fd()
    }

    /// Whether every file of it is on a file system that answers.
    pub(crate) fn never_blocks(&self) -> bool {
        self.files.iter().all(|file| !file.may_block)
    }

    /// Whether asking for a location may keep the asking thread waiting.
    #[must_use]
    pub(crate) fn may_block(&self, at: Location) -> bool {
        self.files[usize::from(at.file)].may_block
    }
}

impl SourceFile {
    fn open(path: &Path, file: &File, bytes: u64) -> Result<Self, SourceError> {
        let failed = |source| SourceError::Map {
            path: path.to_path_buf(),
            source,
        };
        let mapping = match bytes {
            0 => None,
            len => Some(SourceMapping::new(file, len).map_err(failed)?),
        };
        let direct = open_direct(path).map_err(failed)?;
        let may_block = may_block(&direct).map_err(failed)?;
        Ok(Self {
            mapping,
            direct,
            may_block,
        })
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

/// Whether a file's system may wait inside a read that was asked not to: those that do it right
/// are few and known. FUSE waits for its server, a network file system for another host.
fn may_block(file: &File) -> io::Result<bool> {
    let kind = fstatfs(file)?.filesystem_type();
    let known = [
        EXT4_SUPER_MAGIC,
        XFS_SUPER_MAGIC,
        BTRFS_SUPER_MAGIC,
        TMPFS_MAGIC,
    ];
    Ok(!known.contains(&kind))
}

/// Opens for reads that bypass the page cache; file systems without such reads (older
/// tmpfs) are read through it.
fn open_direct(path: &Path) -> io::Result<File> {
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path);
    match direct {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => File::open(path),
        other => other,
    }
}
