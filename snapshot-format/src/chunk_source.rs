//! The data of a chain, read in whole chunks that are compared with their sums.
//!
//! For readers off the hot path: a rewritten page with a new checksum must not be a rotten one.
//! Extents of one window are sorted by where they are stored, so that each origin is read front
//! to back, in reads of up to 4 MiB.

use std::ops::Range;

use crate::build::Build;
use crate::checksum::crc32c;
use crate::data_file::DataFile;
use crate::error::{Fault, FormatError};
use crate::extent::{Extent, Origin};
use crate::manifest::file_name;
use crate::sums::DataSums;
use crate::units::PageSize;

/// How much is read at a time; at least one chunk.
const READ_BYTES: u64 = 4 << 20;

/// An extent of a window with content, and where in the window its first page belongs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub(crate) extent: Extent,
    /// In bytes.
    pub(crate) at: usize,
}

/// Reads windows of pages from all builds that a map names.
#[derive(Debug)]
pub(crate) struct ChunkSource {
    build: Build,
    /// By origin, once they were needed.
    sums: Vec<Option<DataSums>>,
    loaded: Loaded,
    bytes_read: u64,
}

/// The chunks that were read last.
#[derive(Debug, Default)]
struct Loaded {
    origin: usize,
    bytes: Range<u64>,
    content: Vec<u8>,
}

impl ChunkSource {
    pub(crate) fn new(build: Build) -> Self {
        Self {
            sums: vec![None; build.map().builds().len()],
            build,
            loaded: Loaded::default(),
            bytes_read: 0,
        }
    }

    /// How much was read so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Fills the parts of `window` that `extents` place there; sorts them on the way.
    pub(crate) fn read(
        &mut self,
        extents: &mut [Placed],
        window: &mut [u8],
    ) -> Result<(), FormatError> {
        extents.sort_unstable_by_key(|placed| (placed.extent.origin, placed.extent.storage));
        let page_size = self.build.map().page_size();
        for next in 0..extents.len() {
            let (origin, bytes) = stored(&extents[next].extent, page_size);
            let (mut at, mut to) = (bytes.start, extents[next].at);
            while at < bytes.end {
                if origin != self.loaded.origin || !self.loaded.bytes.contains(&at) {
                    let wanted = wanted(&extents[next..], origin, at, page_size);
                    self.load(origin, &wanted)?;
                }
                let end = bytes.end.min(self.loaded.bytes.end);
                let part = in_memory(at - self.loaded.bytes.start)
                    ..in_memory(end - self.loaded.bytes.start);
                let length = part.len();
                window[to..to + length].copy_from_slice(&self.loaded.content[part]);
                (at, to) = (end, to + length);
            }
        }
        Ok(())
    }

    /// Reads the chunks that cover the beginning of a range of an origin's data, at least one.
    fn load(&mut self, origin: usize, wanted: &Range<u64>) -> Result<(), FormatError> {
        let data = &self.build.data_files()[origin];
        let sums = match &mut self.sums[origin] {
            Some(sums) => sums,
            none => none.insert(open_sums(&self.build, origin)?),
        };
        let size = u64::from(sums.header().chunk_bytes);
        let first = wanted.start / size;
        let most = (READ_BYTES / size).max(1);
        let end = wanted.end.div_ceil(size).clamp(first + 1, first + most);
        let bytes = first * size..(end * size).min(sums.header().data_bytes);
        self.loaded.origin = origin;
        self.loaded.bytes = 0..0; // nothing, unless all of this succeeds
        self.loaded
            .content
            .resize(in_memory(bytes.end - bytes.start), 0);
        data.read_bytes(&mut self.loaded.content, bytes.start)?;
        self.bytes_read += bytes.end - bytes.start;
        for (chunk, content) in (first..).zip(self.loaded.content.chunks(in_memory(size))) {
            let (expected, found) = (sums.sums()[in_memory(chunk)], crc32c(content));
            if expected != found {
                let at = chunk * size;
                return Err(Fault::checksum(data.path(), at, "data chunk", expected, found).into());
            }
        }
        self.loaded.bytes = bytes;
        Ok(())
    }
}

/// The sums of an origin, which are those that the map was written against.
fn open_sums(build: &Build, origin: usize) -> Result<DataSums, FormatError> {
    let (data, entry) = (&build.data_files()[origin], build.map().builds()[origin]);
    let path = data.path().with_file_name(file_name::SUMS);
    let sums = DataSums::open(&path)?;
    let found = sums.header().header_crc;
    if found == entry.sums_crc {
        Ok(sums)
    } else {
        Err(Fault::checksum(&path, 0, "sums", entry.sums_crc, found).into())
    }
}

/// Where an extent with content is stored: its origin, and bytes of that.
fn stored(extent: &Extent, page_size: PageSize) -> (usize, Range<u64>) {
    let Origin::Build(origin) = extent.origin else {
        unreachable!("zero memory is not placed in a window");
    };
    let start = DataFile::offset(extent.storage, page_size);
    let end = DataFile::offset(extent.storage + extent.pages, page_size);
    (usize::from(origin), start..end)
}

/// From `at` on, how far the extents at the front want the data without a larger gap.
fn wanted(extents: &[Placed], origin: usize, at: u64, page_size: PageSize) -> Range<u64> {
    /// Reading through a gap of this size is cheaper than another system call.
    const GAP_BYTES: u64 = 64 << 10;
    let mut end = at;
    for placed in extents {
        let (next_origin, bytes) = stored(&placed.extent, page_size);
        if next_origin != origin || bytes.start > end + GAP_BYTES || end >= at + READ_BYTES {
            break;
        }
        end = end.max(bytes.end);
    }
    at..end
}

fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a window and the sums of a build fit memory")
}
