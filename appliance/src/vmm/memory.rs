//! A guest's memory as its VMM is to have it: how much, in what pages, in what file.

use std::fs::File;
use std::io;

use nix::sys::memfd::{MFdFlags, memfd_create};
use snapshot_format::{PageCount, PageSize};

/// How much memory a guest has, and in what pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    /// In bytes: a whole number of pages.
    pub bytes: u64,
    /// What it is mapped, served and saved in.
    pub page_size: PageSize,
}

impl MemorySize {
    /// How many pages it has.
    #[must_use]
    pub fn pages(self) -> PageCount {
        PageCount::new(self.bytes / self.page_size.bytes())
    }

    /// Whether its pages are huge.
    #[must_use]
    pub fn is_huge(self) -> bool {
        self.page_size != PageSize::Size4K
    }

    /// An empty file of it that only descriptors hold: nothing is left of it when its holders are
    /// gone.
    ///
    /// # Errors
    /// As `memfd_create(2)`.
    pub fn file(self) -> io::Result<File> {
        let mut flags = MFdFlags::MFD_CLOEXEC;
        if self.is_huge() {
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        }
        let file = File::from(memfd_create(c"thaw-ram", flags)?);
        file.set_len(self.bytes)?;
        Ok(file)
    }
}
