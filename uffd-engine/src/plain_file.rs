//! A plain memory file seen as extents: what it stores, and holes that are zero.
//!
//! Invariant: the extents are sorted, touch each other and cover the whole memory.

use std::fs::File;
use std::io;

use nix::unistd::{Whence, lseek64};
use snapshot_format::{Extent, MAX_MEMORY_BYTES, Origin, PageCount, PageIndex, PageSize};

/// The extents of one file.
#[derive(Debug)]
pub(crate) struct PlainFile {
    page_size: PageSize,
    pages: PageCount,
    extents: Vec<Extent>,
}

impl PlainFile {
    /// Asks the file system which parts of a file are stored. A page of which it stores anything
    /// is stored.
    pub(crate) fn read(file: &File, page_size: PageSize) -> io::Result<Self> {
        let page = page_size.bytes();
        let bytes = file.metadata()?.len();
        if bytes == 0 || !bytes.is_multiple_of(page) || bytes > MAX_MEMORY_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a memory of {bytes} bytes can't be served in pages of {page}"),
            ));
        }
        let mut extents = Vec::new();
        let mut push = |from, to, origin| extents.extend(extent(from / page, to / page, origin));
        let mut at = 0;
        while at < bytes {
            let data = match lseek64(file, at as i64, Whence::SeekData) {
                Ok(data) => (data as u64 / page * page).max(at),
                Err(nix::Error::ENXIO) => bytes,
                Err(error) => return Err(error.into()),
            };
            push(at, data, Origin::Zero);
            if data == bytes {
                break;
            }
            let hole = lseek64(file, data as i64, Whence::SeekHole)? as u64;
            let hole = hole.next_multiple_of(page).clamp(data + page, bytes);
            push(data, hole, Origin::Build(0));
            at = hole;
        }
        Ok(Self {
            page_size,
            pages: PageCount::new(bytes / page),
            extents,
        })
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.page_size
    }

    pub(crate) fn pages(&self) -> PageCount {
        self.pages
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.pages.get() * self.page_size.bytes()
    }

    /// The extent with a page; `None` outside the memory.
    pub(crate) fn lookup(&self, page: PageIndex) -> Option<Extent> {
        let after = self.extents.partition_point(|extent| extent.start <= page);
        let extent = self.extents[after.checked_sub(1)?];
        (page < extent.end()).then_some(extent)
    }
}

/// The extent from one page to before another, if there are any.
fn extent(from: u64, to: u64, origin: Origin) -> Option<Extent> {
    let start = PageIndex::new(from);
    (from < to).then_some(Extent {
        start,
        pages: PageCount::new(to - from),
        origin,
        storage: match origin {
            Origin::Zero => PageIndex::new(0),
            Origin::Build(_) => start,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const PAGE: u64 = PageSize::Size4K.bytes();

    fn memfd(pages: u64) -> File {
        let memfd = nix::sys::memfd::memfd_create(c"ram", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        let file = File::from(memfd.unwrap());
        file.set_len(pages * PAGE).unwrap();
        file
    }

    #[test]
    fn stored_pages_lie_at_their_own_place_and_holes_are_zero() {
        let file = memfd(32);
        file.write_all_at(&[1; 8192], 10 * PAGE).unwrap();
        file.write_all_at(&[1], 31 * PAGE).unwrap();
        let plain = PlainFile::read(&file, PageSize::Size4K).unwrap();
        assert_eq!(plain.pages().get(), 32);
        for page in 0..32 {
            let extent = plain.lookup(PageIndex::new(page)).unwrap();
            if [10, 11, 31].contains(&page) {
                assert_eq!(extent.origin, Origin::Build(0), "{page}");
                assert_eq!(extent.storage_of(PageIndex::new(page)).get(), page);
            } else {
                assert_eq!(extent.origin, Origin::Zero, "{page}");
            }
        }
        assert!(plain.lookup(PageIndex::new(32)).is_none());
    }

    #[test]
    fn a_huge_page_is_stored_if_anything_of_it_is() {
        let file = memfd(6 * 512);
        // The end of one and the beginning of the next; two places in a third.
        file.write_all_at(&[1; 8192], 2 * 512 * PAGE - PAGE)
            .unwrap();
        for at in [4 * 512 + 7, 4 * 512 + 300] {
            file.write_all_at(&[1], at * PAGE).unwrap();
        }
        let plain = PlainFile::read(&file, PageSize::Size2M).unwrap();
        assert_eq!((plain.pages().get(), plain.bytes()), (6, 6 * 512 * PAGE));
        let is_stored = |page| {
            let extent = plain.lookup(PageIndex::new(page)).unwrap();
            extent.origin == Origin::Build(0)
        };
        let stored: Vec<u64> = (0..6).filter(|page| is_stored(*page)).collect();
        assert_eq!(stored, [1, 2, 4]);
    }

    #[test]
    fn a_file_that_is_no_whole_number_of_pages_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let read = |page_size| PlainFile::read(&file, page_size);
        assert!(read(PageSize::Size4K).is_err(), "empty");
        file.set_len(PAGE + 1).unwrap();
        assert!(read(PageSize::Size4K).is_err());
        file.set_len(3 * PAGE).unwrap();
        assert!(read(PageSize::Size4K).is_ok());
        assert!(read(PageSize::Size2M).is_err(), "no huge page");
    }
}
