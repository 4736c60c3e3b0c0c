//! Adopts a sparse file that a VMM wrote as `memory.data`, without a second copy.
//!
//! The file has every page where the guest has it, so a storage page is a guest page. Data are
//! pages that changed, holes are inherited. Pages of data that are zero or equal to the parent's
//! get no storage in the map; they stay in the file, unused.
//!
//! Over a parent this is only right if holes are as fine as pages: a file system that keeps
//! holes in larger units shows neighbours of a written page as written zeros, and those would
//! replace the parent's content. On tmpfs mounted with `huge=always`, one written page of 4 KiB
//! shows as 2 MiB of data. Such a file is refused: the block size that `stat` reports is never
//! smaller than that unit (2 MiB there). Source: Linux, `shmem_getattr` and `generic_fillattr`;
//! probed on 6.18.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::build::Build;
use crate::changes::{Changes, Decision, decide};
use crate::error::FormatError;
use crate::memory_target::{MemoryTarget, WriteSummary};
use crate::memory_writer::MemoryWriter;
use crate::parent_pages::{ParentPages, window_pages};
use crate::sparse::next_data;
use crate::staging::Staging;
use crate::sums_builder::SumsBuilder;
use crate::units::{ByteOffset, PageCount, PageIndex, PageSize};

impl MemoryWriter {
    /// Makes the file `memory.data`, already in the staging directory, the memory of this
    /// build: its holes are inherited from `parent`, or zero if there is none.
    ///
    /// The file may end before the memory does. It must not change any more.
    ///
    /// # Errors
    /// [`FormatError::HoleGranularity`] if its holes don't tell which pages were written,
    /// [`FormatError::PartialPage`], [`FormatError::OutsideMemory`],
    /// [`FormatError::MemorySize`], [`FormatError::ParentGeometry`],
    /// [`FormatError::TooManyBuilds`] or [`FormatError::Io`].
    pub fn adopt_sparse(
        staging: &Staging,
        parent: Option<&Build>,
        page_size: PageSize,
        memory_pages: PageCount,
    ) -> Result<WriteSummary, FormatError> {
        let target = MemoryTarget::new(staging, parent, page_size, memory_pages)?;
        let mut scan = Scan::open(&target)?;
        while let Some(range) = scan.next_pages()? {
            scan.judge(range)?;
        }
        scan.sums.append_zeros(scan.bytes - scan.summed);
        let Scan { changes, sums, .. } = scan;
        target.finish(&changes, sums)
    }
}

struct Scan<'a> {
    target: &'a MemoryTarget,
    file: File,
    bytes: u64,
    parent: ParentPages,
    changes: Changes,
    sums: SumsBuilder,
    /// How much of the file is judged and summed.
    summed: u64,
    buffer: Vec<u8>,
}

impl<'a> Scan<'a> {
    fn open(target: &'a MemoryTarget) -> Result<Self, FormatError> {
        let (path, page_size) = (target.data_path(), target.page_size);
        let file = File::open(&path).map_err(FormatError::io("Opening", &path))?;
        let metadata = file
            .metadata()
            .map_err(FormatError::io("Reading the size of", &path))?;
        let bytes = metadata.len();
        if !bytes.is_multiple_of(page_size.bytes()) {
            return Err(FormatError::PartialPage { bytes, page_size });
        }
        let (pages, memory_pages) = (bytes / page_size.bytes(), target.memory_pages);
        if pages > memory_pages.get() {
            return Err(FormatError::OutsideMemory {
                start: PageIndex::new(0),
                pages: PageCount::new(pages),
                memory_pages,
            });
        }
        let granularity = metadata.blksize();
        if target.parent().is_some() && granularity > page_size.bytes() {
            return Err(FormatError::HoleGranularity { path, granularity });
        }
        Ok(Self {
            target,
            file,
            bytes,
            parent: ParentPages::new(target.parent().cloned(), page_size),
            changes: Changes::new(target.own_origin()),
            sums: SumsBuilder::default(),
            summed: 0,
            buffer: Vec::new(),
        })
    }

    /// The next run of pages with data, in bytes.
    fn next_pages(&self) -> Result<Option<Range<u64>>, FormatError> {
        let path = self.target.data_path();
        let data = next_data(&self.file, self.summed, self.bytes)
            .map_err(FormatError::io("Seeking in", &path))?;
        let Some(Range { start, end }) = data else {
            return Ok(None);
        };
        let page = self.target.page_size.bytes();
        let whole = start - start % page..end.next_multiple_of(page);
        if self.target.parent().is_some() && whole != (start..end) {
            // Part of a page was written: is the rest of it zero, or the parent's?
            let granularity = if start % page == 0 { end } else { start };
            return Err(FormatError::HoleGranularity { path, granularity });
        }
        Ok(Some(whole))
    }

    /// Reads, sums and judges a run of pages.
    fn judge(&mut self, range: Range<u64>) -> Result<(), FormatError> {
        self.sums.append_zeros(range.start - self.summed);
        let page_size = self.target.page_size;
        let page_bytes = usize::try_from(page_size.bytes()).expect("a page fits memory");
        let window = window_pages(page_size) * page_size.bytes();
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(window);
            self.buffer
                .resize(usize::try_from(length).expect("a window fits memory"), 0);
            self.file
                .read_exact_at(&mut self.buffer, at)
                .map_err(FormatError::io("Reading", &self.target.data_path()))?;
            self.sums.append(&self.buffer);
            let first = ByteOffset::new(at).page(page_size);
            self.parent.load(first, self.buffer.len() / page_bytes)?;
            for (position, content) in self.buffer.chunks_exact(page_bytes).enumerate() {
                let page = first + PageCount::new(position as u64);
                match decide(content, self.parent.page(position)) {
                    Decision::Drop => self.changes.drop_page(),
                    Decision::Zero => self.changes.zero(page, PageCount::new(1)),
                    Decision::Store => self.changes.store(page, PageCount::new(1), page),
                }
            }
            at += length;
        }
        self.summed = range.end;
        Ok(())
    }
}
