//! Writes a build's memory from pages that are handed over in ascending order.
//!
//! Whatever is not mentioned is inherited. The writer decides about each page
//! ([`changes`](crate::changes)), packs the stored ones into `memory.data` in writes of 1 MiB at
//! multiples of 1 MiB, and sums them on the way.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use crate::build::Build;
use crate::changes::{Changes, Decision, decide};
use crate::error::FormatError;
use crate::extent::Origin;
use crate::memory_target::{MemoryTarget, WriteSummary};
use crate::overlay::inherited;
use crate::parent_pages::{ParentPages, window_pages};
use crate::staging::Staging;
use crate::storage::Storage;
use crate::sums_builder::SumsBuilder;
use crate::units::{PageCount, PageIndex, PageSize};

const WRITE_BYTES: usize = 1 << 20;
/// What the disk is told to take at a time. It works while the next pages are compared, where an
/// fsync at the end would leave all of it to the end. The pages stay in the page cache, where
/// the next resume looks for them: O_DIRECT would be no faster and lose them.
const SEND_BYTES: u64 = 8 << 20;

/// The memory of a staged build, being written.
///
/// It borrows nothing, so it can be moved to the thread that has the pages.
#[derive(Debug)]
pub struct MemoryWriter {
    target: MemoryTarget,
    parent: ParentPages,
    changes: Changes,
    data: DataWriter,
    next: PageIndex,
}

impl Staging {
    /// Begins the memory of this build: a diff over `parent`, or a base over zeros.
    ///
    /// # Errors
    /// [`FormatError::MemorySize`], [`FormatError::ParentGeometry`] or [`FormatError::Io`].
    pub fn memory_writer(
        &self,
        parent: Option<&Build>,
        page_size: PageSize,
        memory_pages: PageCount,
    ) -> Result<MemoryWriter, FormatError> {
        let target = MemoryTarget::new(self, parent, page_size, memory_pages)?;
        Ok(MemoryWriter {
            parent: ParentPages::new(parent.cloned(), page_size),
            changes: Changes::new(target.own_origin()),
            data: DataWriter::create(Arc::clone(&target.storage), target.data_path())?,
            target,
            next: PageIndex::new(0),
        })
    }
}

impl MemoryWriter {
    /// Takes the content of whole pages, from `start` on.
    ///
    /// # Errors
    /// [`FormatError::PartialPage`], [`FormatError::OutOfOrder`],
    /// [`FormatError::OutsideMemory`] or [`FormatError::Io`].
    pub fn pages(&mut self, start: PageIndex, bytes: &[u8]) -> Result<(), FormatError> {
        let page_size = self.target.page_size;
        let length = bytes.len() as u64;
        if !length.is_multiple_of(page_size.bytes()) {
            let bytes = length;
            return Err(FormatError::PartialPage { bytes, page_size });
        }
        let mut page = start;
        self.advance(start, PageCount::new(length / page_size.bytes()))?;
        let page_bytes = usize::try_from(page_size.bytes()).expect("a page fits memory");
        let window = usize::try_from(window_pages(page_size)).expect("a window fits memory");
        for part in bytes.chunks(window * page_bytes) {
            let pages = part.len() / page_bytes;
            self.parent.load(page, pages)?;
            self.window(page, part, page_bytes)?;
            page = page + PageCount::new(pages as u64);
        }
        Ok(())
    }

    /// Decides about the pages of a window, and stores them by the run.
    fn window(
        &mut self,
        start: PageIndex,
        content: &[u8],
        page_bytes: usize,
    ) -> Result<(), FormatError> {
        let at = |position: usize| start + PageCount::new(position as u64);
        let mut run = 0..0;
        for (position, page) in content.chunks_exact(page_bytes).enumerate() {
            let decision = decide(page, self.parent.page(position));
            if decision == Decision::Store && run.end == position {
                run.end += 1;
                continue;
            }
            self.store(
                at(run.start),
                &content[run.start * page_bytes..run.end * page_bytes],
            )?;
            run = position..position;
            match decision {
                Decision::Drop => self.changes.drop_page(),
                Decision::Zero => self.changes.zero(at(position), PageCount::new(1)),
                Decision::Store => run.end += 1,
            }
        }
        self.store(
            at(run.start),
            &content[run.start * page_bytes..run.end * page_bytes],
        )
    }

    /// Stores pages that have content of their own; none is no change.
    fn store(&mut self, start: PageIndex, content: &[u8]) -> Result<(), FormatError> {
        if content.is_empty() {
            return Ok(());
        }
        let pages = PageCount::new(content.len() as u64 / self.target.page_size.bytes());
        let storage = PageIndex::new(self.changes.stored.get());
        self.changes.store(start, pages, storage);
        self.data.append(content)
    }

    /// Takes pages that are zero now, even if the parent has content there.
    ///
    /// # Errors
    /// [`FormatError::OutOfOrder`] or [`FormatError::OutsideMemory`].
    pub fn zero(&mut self, start: PageIndex, pages: PageCount) -> Result<(), FormatError> {
        self.advance(start, pages)?;
        let parent = self.parent.parent().map(Build::map);
        for extent in inherited(parent, start..start + pages) {
            if extent.origin != Origin::Zero {
                self.changes.zero(extent.start, extent.pages);
            }
        }
        Ok(())
    }

    /// Writes the rest of the data, the sums and the map.
    ///
    /// # Errors
    /// [`FormatError::TooManyBuilds`] or [`FormatError::Io`].
    pub fn finish(self) -> Result<WriteSummary, FormatError> {
        let sums = self.data.finish()?;
        self.target.finish(&self.changes, sums)
    }

    /// Checks that a range lies in the memory and behind everything taken so far.
    fn advance(&mut self, start: PageIndex, pages: PageCount) -> Result<(), FormatError> {
        let memory_pages = self.target.memory_pages;
        let end = start
            .checked_add(pages)
            .filter(|end| end.get() <= memory_pages.get())
            .ok_or(FormatError::OutsideMemory {
                start,
                pages,
                memory_pages,
            })?;
        if start < self.next {
            let next = self.next;
            return Err(FormatError::OutOfOrder { start, next });
        }
        self.next = end;
        Ok(())
    }
}

/// Packs pages into `memory.data`.
#[derive(Debug)]
struct DataWriter {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
    written: u64,
    /// How much of that the disk was told to take.
    sent: u64,
    sums: SumsBuilder,
}

impl DataWriter {
    fn create(storage: Arc<dyn Storage>, path: PathBuf) -> Result<Self, FormatError> {
        let file = storage
            .create_file(&path)
            .map_err(FormatError::io("Creating", &path))?;
        Ok(Self {
            storage,
            path,
            file,
            buffer: Vec::with_capacity(WRITE_BYTES),
            written: 0,
            sent: 0,
            sums: SumsBuilder::default(),
        })
    }

    fn append(&mut self, mut bytes: &[u8]) -> Result<(), FormatError> {
        while !bytes.is_empty() {
            if self.buffer.is_empty() && bytes.len() >= WRITE_BYTES {
                let (now, later) = bytes.split_at(WRITE_BYTES);
                self.write(now)?;
                bytes = later;
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(WRITE_BYTES - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            if self.buffer.len() == WRITE_BYTES {
                self.flush()?;
            }
            bytes = later;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), FormatError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let written = self.write(&buffer);
        buffer.clear();
        self.buffer = buffer;
        written
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.sums.append(bytes);
        self.storage
            .write_at(&self.file, &self.path, self.written, bytes)
            .map_err(FormatError::io("Writing", &self.path))?;
        self.written += bytes.len() as u64;
        let pending = self.written - self.sent;
        if pending >= SEND_BYTES {
            self.storage.start_writeback(&self.file, self.sent, pending);
            self.sent = self.written;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<SumsBuilder, FormatError> {
        if !self.buffer.is_empty() {
            self.flush()?;
        }
        Ok(self.sums)
    }
}
