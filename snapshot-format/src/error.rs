//! What can go wrong with a build, one variant per thing a caller can do differently.
//!
//! Corruption is described by [`Fault`], which [`verify`](crate::verify) collects and
//! [`FormatError::Corrupt`] carries. Texts never contain their source: print the chain.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::build_id::BuildId;
use crate::encoding::Encoding;
use crate::units::{PageCount, PageIndex, PageSize};

/// One place where a file is not what it has to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The file.
    pub file: PathBuf,
    /// Where in the file the faulty field, section or chunk begins, in bytes.
    pub offset: u64,
    /// What is faulty.
    pub what: &'static str,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub found: String,
}

impl Fault {
    pub(crate) fn new(
        file: &Path,
        offset: u64,
        what: &'static str,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Self {
        Self {
            file: file.to_owned(),
            offset,
            what,
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// A checksum that doesn't match; `offset` is where the bytes it covers begin.
    pub(crate) fn checksum(
        file: &Path,
        offset: u64,
        what: &'static str,
        expected: u32,
        found: u32,
    ) -> Self {
        let (expected, found) = (format!("{expected:08x}"), format!("{found:08x}"));
        Self::new(file, offset, what, expected, found)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Corrupt {} in {} at offset {:#x}: expected {}, found {}",
            self.what,
            self.file.display(),
            self.offset,
            self.expected,
            self.found
        )
    }
}

/// Why a build can't be read, written or published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was being done, as a capitalised gerund.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// A file breaks a rule of the format or fails its checksum.
    #[error("{0}")]
    Corrupt(Box<Fault>),
    /// The file is of a format version, or uses a feature, that this reader doesn't know.
    #[error("Unsupported {what} {found} of {}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The field that says so.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// The store has no such build.
    #[error("Build {build_id} is not in the store")]
    NotFound {
        /// The build that was asked for.
        build_id: BuildId,
    },
    /// A build that this one takes pages from is not in the store.
    #[error("Build {ancestor}, which {build_id} takes pages from, is not in the store")]
    AncestorMissing {
        /// The build that was opened or published.
        build_id: BuildId,
        /// The one it needs.
        ancestor: BuildId,
    },
    /// A build that this one takes pages from is another one than when it was written.
    #[error(
        "Build {ancestor}, which {build_id} takes pages from, has data checksum {found:08x} \
         instead of {expected:08x}"
    )]
    AncestorChanged {
        /// The build that was opened or published.
        build_id: BuildId,
        /// The one it needs.
        ancestor: BuildId,
        /// The identity of the ancestor's data that the build was written against.
        expected: u32,
        /// The identity it has now.
        found: u32,
    },
    /// Pages of the build can't be read where its map says, because they are encoded: open it as
    /// a cold one, or merge it into one that isn't.
    #[error("Data of build {ancestor}, which {build_id} takes pages from, is stored as {encoding}")]
    Cold {
        /// The build that was opened.
        build_id: BuildId,
        /// The one that is encoded; maybe the same.
        ancestor: BuildId,
        /// How.
        encoding: Encoding,
    },
    /// The store already has this build, or a staging directory for it.
    #[error("Build {build_id} already exists at {}", path.display())]
    AlreadyExists {
        /// The build.
        build_id: BuildId,
        /// Where.
        path: PathBuf,
    },
    /// Sixteen zero bytes are not an id.
    #[error("Build id is all zeros")]
    NilBuildId,
    /// The memory has no page or more than the format can describe.
    #[error("Memory of {pages} pages of {page_size} is outside the limits of the format")]
    MemorySize {
        /// The memory.
        pages: PageCount,
        /// Its page size.
        page_size: PageSize,
    },
    /// A diff has another memory geometry than its parent, or a build than the one it is compared
    /// with.
    #[error(
        "Memory of {pages} pages of {page_size} differs from that of {parent}, which has \
         {parent_pages} pages of {parent_page_size}"
    )]
    ParentGeometry {
        /// The parent, or the build that is compared with.
        parent: BuildId,
        /// The diff's memory.
        pages: PageCount,
        /// The diff's page size.
        page_size: PageSize,
        /// The parent's memory.
        parent_pages: PageCount,
        /// The parent's page size.
        parent_page_size: PageSize,
    },
    /// The pages asked for or written don't exist in this memory.
    #[error("Pages {start} and on, {pages} of them, are outside a memory of {memory_pages}")]
    OutsideMemory {
        /// The first page.
        start: PageIndex,
        /// How many.
        pages: PageCount,
        /// The size of the memory.
        memory_pages: PageCount,
    },
    /// Pages were written out of order.
    #[error("Page {start} was written after page {next} was due")]
    OutOfOrder {
        /// The page that came.
        start: PageIndex,
        /// The first page that could have come.
        next: PageIndex,
    },
    /// A buffer or file is not a whole number of pages.
    #[error("Length of {bytes} bytes is not that of whole pages of {page_size}")]
    PartialPage {
        /// The length.
        bytes: u64,
        /// The page size.
        page_size: PageSize,
    },
    /// A diff would take pages from more builds than a map can name: merge the chain first.
    #[error("Build takes pages from {builds} builds, more than a map can name")]
    TooManyBuilds {
        /// How many.
        builds: usize,
    },
    /// The holes of an adopted file don't tell which pages were written.
    #[error("Holes of {} have granularity {granularity}, coarser or finer than a page", path.display())]
    HoleGranularity {
        /// The file.
        path: PathBuf,
        /// The unit in which the file system keeps holes, or where a hole ended.
        granularity: u64,
    },
    /// Not a name that a file of a build can have.
    #[error("File name {name:?} is not allowed in a build")]
    FileName {
        /// The name.
        name: String,
    },
    /// The staging directory holds a file that nobody registered.
    #[error("File {name:?} was not registered before publishing")]
    Unregistered {
        /// The name.
        name: String,
    },
    /// An import stream has something else than what is due.
    #[error("Import stream has {found} for {entry:?}: expected {expected}")]
    StreamContent {
        /// The entry that it is about.
        entry: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// An import stream ends too early.
    #[error("Import stream ends before the end of {entry:?}")]
    StreamTruncated {
        /// The entry that is missing or cut.
        entry: String,
    },
    /// Something in an import stream is larger than is allowed.
    #[error("Import stream has {bytes} bytes of {entry:?}, more than {limit}")]
    StreamTooLarge {
        /// The entry.
        entry: String,
        /// Its size.
        bytes: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A manifest is larger than a reader accepts.
    #[error("Manifest of {bytes} bytes is over the limit")]
    ManifestTooLarge {
        /// Its size.
        bytes: u64,
    },
}

impl FormatError {
    /// For `map_err`: an I/O error with its operation and path.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    }
}

impl From<Fault> for FormatError {
    fn from(fault: Fault) -> Self {
        Self::Corrupt(Box::new(fault))
    }
}
