//! A stopped guest's memory as something to read: which pages it has, and what is in them.
//!
//! | VMM | memory | pages it has |
//! |---|---|---|
//! | QEMU | a memfd that the daemon holds, too | the file's data; the rest are holes |
//! | QEMU, huge pages, resumed | the same, looked at in the VMM's process | as below: its file tells nothing |
//! | Firecracker, resumed | anonymous, in the VMM's process | what its page table says is there |
//! | Firecracker, booted | a file that it wrote | as in a memfd |
//! | Cloud Hypervisor | a memfd for each part of it | as in a memfd |
//!
//! A page that isn't there is never read: in a process whose memory is served, that would be a
//! fault, and the page would come from its build to be compared with it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::unistd::{Whence, lseek64};
use snapshot_format::{PageCount, PageIndex};

use crate::region::RegionTable;
use crate::sys::mapping::CACHE_PAGE;

/// Entries of a page table that are looked at in one read: a page of them, and one huge page's.
const ENTRIES: usize = 512;
const ENTRY_BYTES: usize = 8;
/// Present, or in swap. Source: `Documentation/admin-guide/mm/pagemap.rst`.
const IN_MEMORY: u64 = 1 << 63 | 1 << 62;

/// A guest's memory. It changes only where an engine still installs what it had read ahead.
#[derive(Debug)]
pub enum MemoryImage {
    /// A file with holes where it has no pages.
    File(File),
    /// Several of them.
    Parts(Parts),
    /// The VMM's own.
    Process(ProcessMemory),
}

/// Memory in files, one after the other.
#[derive(Debug)]
pub struct Parts {
    parts: Vec<Part>,
}

/// A part of the memory that is in one file.
#[derive(Debug)]
pub struct Part {
    /// The file, with holes where it has no pages.
    pub file: File,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// How many bytes it has, whole pages of them.
    pub bytes: u64,
}

impl Parts {
    /// Memory of these parts, in the order of their pages.
    ///
    /// # Errors
    /// `InvalidInput` for a file that ends before its part does, or a part of no whole pages.
    pub fn new(parts: Vec<Part>, page_bytes: u64) -> io::Result<Self> {
        for (number, part) in parts.iter().enumerate() {
            let (Part { offset, bytes, .. }, has) = (part, part.file.metadata()?.len());
            let whole = offset.is_multiple_of(page_bytes) && bytes.is_multiple_of(page_bytes);
            if !whole || *bytes == 0 || offset.checked_add(*bytes).is_none_or(|end| end > has) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("part {number}: {bytes} bytes at {offset:#x} of a file with {has}"),
                ));
            }
        }
        Ok(Self { parts })
    }

    /// The part with a page: its file, the page's number in the file, and how many pages of the
    /// part there are from it on.
    fn at(&self, page: u64, page_bytes: u64) -> Option<(&File, u64, u64)> {
        let mut first = 0;
        for part in &self.parts {
            let pages = part.bytes / page_bytes;
            if page < first + pages {
                let within = page - first;
                return Some((
                    &part.file,
                    part.offset / page_bytes + within,
                    pages - within,
                ));
            }
            first += pages;
        }
        None
    }

    fn next_data(&self, from: u64, end: u64, page_bytes: u64) -> io::Result<Range<u64>> {
        let mut at = from;
        while at < end
            && let Some((file, place, left)) = self.at(at, page_bytes)
        {
            let left = left.min(end - at);
            let data = next_data_of_file(file, place, place + left, page_bytes)?;
            if data.start < data.end {
                return Ok(at + data.start - place..at + data.end - place);
            }
            at += left;
        }
        Ok(end..end)
    }

    fn read(&self, page: PageIndex, page_bytes: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let page = page.get() + done as u64 / page_bytes;
            let (file, place, left) = self
                .at(page, page_bytes)
                .ok_or(io::ErrorKind::UnexpectedEof)?;
            let len = (bytes.len() - done).min((left * page_bytes) as usize);
            file.read_exact_at(&mut bytes[done..done + len], place * page_bytes)?;
            done += len;
        }
        Ok(())
    }
}

/// Memory inside of a VMM's process.
#[derive(Debug)]
pub struct ProcessMemory {
    memory: File,
    pagemap: File,
    regions: RegionTable,
}

impl ProcessMemory {
    /// The memory that process `pid` has at `regions`.
    ///
    /// # Errors
    /// It has ended, or may not be looked into.
    pub fn open(pid: i32, regions: RegionTable) -> io::Result<Self> {
        let open = |name: &str| File::open(format!("/proc/{pid}/{name}"));
        Ok(Self {
            memory: open("mem")?,
            pagemap: open("pagemap")?,
            regions,
        })
    }

    /// The next run of pages of the page table, from `from` on, as far as one read goes; `None`
    /// with the page to go on at when there are none among these.
    fn next_run(&self, from: u64, end: u64) -> io::Result<Result<Range<u64>, u64>> {
        let (addr, left) = self.regions.addr_of(PageIndex::new(from));
        // A page table has an entry for every 4 KiB, also of a huge page, which is there as a whole.
        let each = (self.regions.page_bytes() / CACHE_PAGE) as usize;
        let pages = left.get().min(end - from).min((ENTRIES / each) as u64);
        let mut buffer = [0u8; ENTRIES * ENTRY_BYTES];
        let bytes = &mut buffer[..pages as usize * each * ENTRY_BYTES];
        let first = addr.get() / CACHE_PAGE;
        self.pagemap
            .read_exact_at(bytes, first * ENTRY_BYTES as u64)?;
        let entries = bytes.as_chunks::<ENTRY_BYTES>().0;
        let is_there = |entry: &[u8; ENTRY_BYTES]| u64::from_le_bytes(*entry) & IN_MEMORY != 0;
        let mut found = entries.iter().step_by(each).map(is_there);
        let Some(start) = found.position(|there| there) else {
            return Ok(Err(from + pages));
        };
        let more = found.take_while(|there| *there).count() as u64;
        let start = from + start as u64;
        Ok(Ok(start..start + 1 + more))
    }

    fn read(&self, page: PageIndex, bytes: &mut [u8]) -> io::Result<()> {
        let page_bytes = self.regions.page_bytes();
        let mut done = 0;
        while done < bytes.len() {
            let page = PageIndex::new(page.get() + done as u64 / page_bytes);
            let (addr, left) = self.regions.addr_of(page);
            let len = (bytes.len() - done).min((left.get() * page_bytes) as usize);
            self.memory
                .read_exact_at(&mut bytes[done..done + len], addr.get())?;
            done += len;
        }
        Ok(())
    }
}

impl MemoryImage {
    /// A run of pages that it has, the first from `from` on, perhaps not to its end; empty at
    /// `end` when there is none.
    pub(crate) fn next_data(&self, from: u64, end: u64, page_bytes: u64) -> io::Result<Range<u64>> {
        match self {
            Self::File(file) => next_data_of_file(file, from, end, page_bytes),
            Self::Parts(parts) => parts.next_data(from, end, page_bytes),
            Self::Process(process) => {
                let mut at = from;
                while at < end {
                    match process.next_run(at, end)? {
                        Ok(run) => return Ok(run),
                        Err(next) => at = next,
                    }
                }
                Ok(end..end)
            }
        }
    }

    /// Reads whole pages.
    pub(crate) fn read(
        &self,
        page: PageIndex,
        page_bytes: u64,
        bytes: &mut [u8],
    ) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(bytes, page.get() * page_bytes),
            Self::Parts(parts) => parts.read(page, page_bytes, bytes),
            Self::Process(process) => process.read(page, bytes),
        }
    }

    /// How many pages it has.
    ///
    /// # Errors
    /// It can't be looked at.
    pub fn present(&self, pages: PageCount, page_bytes: u64) -> io::Result<PageCount> {
        let (mut at, mut found) = (0, 0);
        while at < pages.get() {
            let run = self.next_data(at, pages.get(), page_bytes)?;
            found += run.end - run.start;
            at = run.end;
        }
        Ok(PageCount::new(found))
    }
}

fn next_data_of_file(file: &File, from: u64, end: u64, page_bytes: u64) -> io::Result<Range<u64>> {
    let data = match lseek64(file, (from * page_bytes) as i64, Whence::SeekData) {
        Ok(at) => at as u64 / page_bytes,
        Err(nix::Error::ENXIO) => return Ok(end..end),
        Err(error) => return Err(error.into()),
    };
    let hole = lseek64(file, (data * page_bytes) as i64, Whence::SeekHole)? as u64;
    Ok(data.min(end)..hole.div_ceil(page_bytes).min(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::ClaimedRegion;
    use crate::sys::guest_memory::GuestMemory;

    #[test]
    fn holes_are_skipped_and_data_is_found() {
        let memfd = nix::sys::memfd::memfd_create(c"ram", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        let ram = File::from(memfd.unwrap());
        ram.set_len(64 * 4096).unwrap();
        ram.write_all_at(&[1; 8192], 10 * 4096).unwrap();
        ram.write_all_at(&[1; 1], 63 * 4096).unwrap();
        let cut = ram.try_clone().unwrap();
        let image = MemoryImage::File(ram);
        assert_eq!(image.next_data(0, 64, 4096).unwrap(), 10..12);
        assert_eq!(image.next_data(12, 64, 4096).unwrap(), 63..64);
        assert_eq!(image.present(PageCount::new(64), 4096).unwrap().get(), 3);
        cut.set_len(20 * 4096).unwrap();
        assert_eq!(image.next_data(12, 20, 4096).unwrap(), 20..20);
    }

    #[test]
    fn parts_are_read_as_one_and_cut_ones_are_refused() {
        let file = |pages: u64| {
            let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
            let file = File::from(nix::sys::memfd::memfd_create(c"ram", flags).unwrap());
            file.set_len(pages * 4096).unwrap();
            file
        };
        let (low, high) = (file(8), file(20));
        let mark = |file: &File, page: u64, with: u8| {
            file.write_all_at(&[with; 4096], page * 4096).unwrap();
        };
        mark(&low, 7, 7);
        // Before the part, at its begin, behind a hole, and after it.
        for (page, with) in [(3, 99), (4, 8), (9, 13), (14, 99)] {
            mark(&high, page, with);
        }
        let part = |file: &File, offset: u64, pages: u64| Part {
            file: file.try_clone().unwrap(),
            offset: offset * 4096,
            bytes: pages * 4096,
        };
        let parts = Parts::new(vec![part(&low, 0, 8), part(&high, 4, 10)], 4096).unwrap();
        let image = MemoryImage::Parts(parts);
        let mut found = Vec::new();
        let mut at = 0;
        while at < 18 {
            let run = image.next_data(at, 18, 4096).unwrap();
            at = run.end;
            found.extend(run);
        }
        assert_eq!(found, [7, 8, 13]);
        assert_eq!(image.next_data(9, 12, 4096).unwrap(), 12..12);
        let mut bytes = vec![0; 2 * 4096];
        image.read(PageIndex::new(7), 4096, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[4095], bytes[4096]), (7, 7, 8));
        assert!(image.read(PageIndex::new(17), 4096, &mut bytes).is_err());
        assert!(Parts::new(vec![part(&low, 0, 9)], 4096).is_err());
        assert!(Parts::new(vec![part(&low, 9, 0)], 4096).is_err());
    }

    #[test]
    fn a_process_has_the_pages_it_touched_and_no_others() {
        let pages = 2048;
        // Two regions, in the other order than the guest has them.
        let memory = GuestMemory::anonymous(pages * 4096).unwrap();
        let half = pages / 2 * 4096;
        let region = |base, offset| ClaimedRegion {
            base,
            size: half,
            offset,
            page_size: 4096,
        };
        let base = memory.base().get();
        let claims = [region(base, half), region(base + half, 0)];
        let regions = RegionTable::new(&claims, 4096, PageCount::new(pages)).unwrap();
        for page in [0, 1, 700, 1023, 1024, 2047] {
            memory.write(page * 4096 + 8, page + 1);
        }
        let pid = std::process::id() as i32;
        let image = MemoryImage::Process(ProcessMemory::open(pid, regions).unwrap());
        let mut found = Vec::new();
        let mut at = 0;
        while at < pages {
            let run = image.next_data(at, pages, 4096).unwrap();
            at = run.end;
            found.extend(run);
        }
        assert_eq!(found, [0, 1023, 1024, 1025, 1724, 2047]);
        // Over the border of the regions.
        let mut bytes = vec![0; 2 * 4096];
        image.read(PageIndex::new(1023), 4096, &mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes[8..16].try_into().unwrap()), 2048);
        assert_eq!(u64::from_le_bytes(bytes[4104..4112].try_into().unwrap()), 1);
        assert_eq!(image.present(PageCount::new(pages), 4096).unwrap().get(), 6);
    }
}
