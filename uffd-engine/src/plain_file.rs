//! A plain memory file seen as extents: what it stores, and holes that are zero.
//!
//! Invariant: the extents are sorted, touch each other and cover the whole memory.

use std::fs::File;
use std::io;

use nix::unistd::{Whence, lseek64};
use snapshot_format::{Extent, MAX_MEMORY_BYTES, Origin, PageCount, PageIndex, PageSize};

const PAGE: u64 = PageSize::Size4K.bytes();

/// The extents of one file.
#[derive(Debug)]
pub(crate) struct PlainFile {
    pages: PageCount,
    extents: Vec<Extent>,
}

impl PlainFile {
    /// Asks the file system which parts of a file are stored.
    pub(crate) fn read(file: &File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        if bytes == 0 || !bytes.is_multiple_of(PAGE) || bytes > MAX_MEMORY_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a memory of {bytes} bytes can't be served in pages of {PAGE}"),
            ));
        }
        let mut extents = Vec::new();
        let mut at = 0;
        while at < bytes {
            let data = match lseek64(file, at as i64, Whence::SeekData) {
                Ok(data) => (data as u64 / PAGE * PAGE).max(at),
                Err(nix::Error::ENXIO) => bytes,
                Err(error) => return Err(error.into()),
            };
            push(&mut extents, at, data, Origin::Zero);
            if data == bytes {
                break;
            }
            let hole = lseek64(file, data as i64, Whence::SeekHole)? as u64;
            let hole = hole.next_multiple_of(PAGE).clamp(data + PAGE, bytes);
            push(&mut extents, data, hole, Origin::Build(0));
            at = hole;
        }
        Ok(Self {
            pages: PageCount::new(bytes / PAGE),
            extents,
        })
    }

    pub(crate) fn pages(&self) -> PageCount {
        self.pages
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.pages.get() * PAGE
    }

    /// The extent with a page; `None` outside the memory.
    pub(crate) fn lookup(&self, page: PageIndex) -> Option<Extent> {
        let after = self.extents.partition_point(|extent| extent.start <= page);
        let extent = self.extents[after.checked_sub(1)?];
        (page < extent.end()).then_some(extent)
    }
}

fn push(extents: &mut Vec<Extent>, from: u64, to: u64, origin: Origin) {
    if from == to {
        return;
    }
    let start = PageIndex::new(from / PAGE);
    extents.push(Extent {
        start,
        pages: PageCount::new((to - from) / PAGE),
        origin,
        storage: match origin {
            Origin::Zero => PageIndex::new(0),
            Origin::Build(_) => start,
        },
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn stored_pages_lie_at_their_own_place_and_holes_are_zero() {
        let memfd = nix::sys::memfd::memfd_create(c"ram", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        let file = File::from(memfd.unwrap());
        file.set_len(32 * PAGE).unwrap();
        file.write_all_at(&[1; 8192], 10 * PAGE).unwrap();
        file.write_all_at(&[1], 31 * PAGE).unwrap();
        let plain = PlainFile::read(&file).unwrap();
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
    fn a_file_that_is_no_whole_number_of_pages_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(PlainFile::read(&file).is_err(), "empty");
        file.set_len(PAGE + 1).unwrap();
        assert!(PlainFile::read(&file).is_err());
    }
}
