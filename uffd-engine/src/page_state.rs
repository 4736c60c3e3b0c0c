//! The state of every page of one session's memory, in a table that outlives the
//! engine.
//!
//! ```text
//!             fault, read started          installed from the build
//!   Missing ───────────────────▶ Reading ───────────────────────────▶ Clean
//!      │                            │ REMOVE                            │ REMOVE
//!      ├── fault on a zero extent ──┼────────────▶ Zero ────REMOVE──┐   │
//!      └── REMOVE ──────────────────┴──────────────────────────▶ Removed ◀┘
//!                                                    Removed ── fault ──▶ Zero
//! ```
//!
//! Invariants: only the worker that owns the session writes; a state says *installed*
//! (`Clean`, `Zero`, `Dirty`) only after the kernel confirmed it, so an engine that
//! died between the two merely installs again; and where writes are tracked, it says
//! `Removed` before zeros are installed where something else was, so that they never pass
//! for that. `Reading` in a table inherited from a dead engine means `Missing`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;

use snapshot_format::{PageCount, PageIndex};

use crate::sys::state_map::StateMap;

/// What has happened to one page since the sandbox was attached. The numbers are
/// what the shared table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageState {
    /// Never asked for: its content is the build's.
    Missing = 0,
    /// A read of its content is under way.
    Reading = 1,
    /// Installed with the build's content.
    Clean = 2,
    /// Installed as zeros.
    Zero = 3,
    /// Known to have been written by the guest.
    Dirty = 4,
    /// Given back by the VMM: its content is zero, whatever the build says.
    Removed = 5,
}

impl PageState {
    /// The state behind a byte of the table; a byte no engine ever wrote is `None`.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Missing,
            1 => Self::Reading,
            2 => Self::Clean,
            3 => Self::Zero,
            4 => Self::Dirty,
            5 => Self::Removed,
            _ => return None,
        })
    }

    /// Whether the kernel has confirmed that a page was put there.
    #[must_use]
    pub const fn is_installed(self) -> bool {
        matches!(self, Self::Clean | Self::Zero | Self::Dirty)
    }
}

/// The table itself. Share it with another process through [`AsFd`].
#[derive(Debug)]
pub struct PageStates {
    map: StateMap,
}

impl PageStates {
    /// A table of `pages` missing pages.
    ///
    /// # Errors
    /// The host is out of memory or descriptors.
    pub fn create(pages: PageCount) -> io::Result<Self> {
        Ok(Self {
            map: StateMap::create(pages.get() as usize)?,
        })
    }

    /// A table of `pages` missing pages in a new file, which outlives all who hold it. As long as
    /// there is one, nobody can [open](Self::open_file) it.
    ///
    /// # Errors
    /// As `open(2)`; `Unsupported` where it would be on disk, or memory for all of it is not there.
    pub fn create_file(path: &Path, pages: PageCount) -> io::Result<Self> {
        Ok(Self {
            map: StateMap::create_file(path, pages.get() as usize)?,
        })
    }

    /// Opens a table in a file when its last holder has ended.
    ///
    /// # Errors
    /// There is none; it is held still (`WouldBlock`); or it is no table for memory of `pages` pages
    /// (`InvalidData`).
    pub fn open_file(path: &Path, pages: PageCount) -> io::Result<Self> {
        Ok(Self {
            map: StateMap::open_file(path, pages.get() as usize)?,
        })
    }

    /// Opens a table that another process made for memory of `pages` pages.
    ///
    /// # Errors
    /// `InvalidData` when it is no such table.
    pub fn from_fd(shared: OwnedFd, pages: PageCount) -> io::Result<Self> {
        Ok(Self {
            map: StateMap::from_fd(shared, pages.get() as usize)?,
        })
    }

    /// Another holder of the same table.
    ///
    /// # Errors
    /// The descriptor table is full, or the address space.
    pub fn share(&self) -> io::Result<Self> {
        Self::from_fd(self.as_fd().try_clone_to_owned()?, self.pages())
    }

    /// How many pages the table covers.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        PageCount::new(self.map.bytes().len() as u64)
    }

    /// The state of one page. A byte that is no state counts as `Missing`, which
    /// makes the kernel the judge: an install over a present page is refused.
    ///
    /// # Panics
    /// The page is outside the memory; addresses are checked when events are read.
    #[must_use]
    pub fn get(&self, page: PageIndex) -> PageState {
        let byte = self.map.bytes()[page.get() as usize].load(Ordering::Acquire);
        PageState::from_byte(byte).unwrap_or(PageState::Missing)
    }

    /// Records a page's state. Only the session's worker calls this.
    ///
    /// # Panics
    /// As [`Self::get`].
    pub fn set(&self, page: PageIndex, state: PageState) {
        self.map.bytes()[page.get() as usize].store(state as u8, Ordering::Release);
    }

    /// Records the same state for a run of pages.
    ///
    /// # Panics
    /// As [`Self::get`].
    pub fn set_run(&self, start: PageIndex, pages: PageCount, state: PageState) {
        let first = start.get() as usize;
        for byte in &self.map.bytes()[first..first + pages.get() as usize] {
            byte.store(state as u8, Ordering::Release);
        }
    }

    /// How many pages were installed and not removed since.
    #[must_use]
    pub fn count_installed(&self) -> PageCount {
        let installed = self.map.bytes().iter().filter(|byte| {
            PageState::from_byte(byte.load(Ordering::Relaxed)).is_some_and(PageState::is_installed)
        });
        PageCount::new(installed.count() as u64)
    }

    /// All states as they are now, page after page.
    #[must_use]
    pub fn to_vec(&self) -> Vec<PageState> {
        (0..self.pages().get())
            .map(|page| self.get(PageIndex::new(page)))
            .collect()
    }

    /// Turns what a dead engine was reading back into what it is: missing.
    pub fn forget_reads(&self) {
        for byte in self.map.bytes() {
            if byte.load(Ordering::Relaxed) == PageState::Reading as u8 {
                byte.store(PageState::Missing as u8, Ordering::Release);
            }
        }
    }
}

impl AsFd for PageStates {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_table_is_seen_by_both_holders() {
        let ours = PageStates::create(PageCount::new(10)).unwrap();
        let theirs = PageStates::from_fd(
            ours.as_fd().try_clone_to_owned().unwrap(),
            PageCount::new(10),
        )
        .unwrap();
        theirs.set(PageIndex::new(3), PageState::Clean);
        theirs.set_run(PageIndex::new(5), PageCount::new(2), PageState::Removed);
        assert_eq!(ours.get(PageIndex::new(3)), PageState::Clean);
        assert_eq!(ours.get(PageIndex::new(6)), PageState::Removed);
        assert_eq!(ours.count_installed(), PageCount::new(1));
    }

    #[test]
    fn a_table_of_the_wrong_size_is_refused() {
        let table = PageStates::create(PageCount::new(10)).unwrap();
        let fd = table.as_fd().try_clone_to_owned().unwrap();
        assert!(PageStates::from_fd(fd, PageCount::new(11)).is_err());
    }

    #[test]
    fn a_file_that_may_shrink_is_refused_as_a_table() {
        let pages = PageCount::new(10);
        let refused = |file: File| {
            file.set_len(10).unwrap();
            let error = PageStates::from_fd(file.into(), pages).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        };
        // It may be on disk, and another's.
        refused(tempfile::tempfile().unwrap());
        let dir = in_memory();
        let others = |mode| {
            let file = tempfile::tempfile_in(dir.path()).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            file.set_permissions(mode).unwrap();
            file
        };
        refused(others(0o620));
        refused(others(0o602));
        if nix::unistd::geteuid().is_root() {
            let file = others(0o600);
            std::os::unix::fs::fchown(&file, Some(65534), None).unwrap();
            refused(file);
        }
        let memfd = nix::sys::memfd::memfd_create(c"t", nix::sys::memfd::MFdFlags::empty());
        refused(memfd.unwrap().into());
    }

    /// A directory of a tmpfs.
    fn in_memory() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    #[test]
    fn a_table_in_a_file_outlives_its_holders_and_is_opened_after_the_last() {
        let dir = in_memory();
        let (path, pages) = (dir.path().join("pages"), PageCount::new(5000));
        let ours = PageStates::create_file(&path, pages).unwrap();
        assert!(
            PageStates::create_file(&path, pages).is_err(),
            "there is one"
        );
        let theirs = ours.as_fd().try_clone_to_owned().unwrap();
        let theirs = PageStates::from_fd(theirs, pages).unwrap();
        let about = std::fs::metadata(&path).unwrap();
        assert_eq!(about.blocks() * 512, 8192, "all of its memory is there");
        assert_eq!(about.mode() & 0o7777, 0o600);
        theirs.set(PageIndex::new(4999), PageState::Dirty);
        for holder in [ours, theirs] {
            let error = PageStates::open_file(&path, pages).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            drop(holder);
        }
        let again = PageStates::open_file(&path, pages).unwrap();
        assert_eq!(again.get(PageIndex::new(4999)), PageState::Dirty);
        assert_eq!(again.get(PageIndex::new(4998)), PageState::Missing);
        drop(again);
        for other in [4999, 5001] {
            let error = PageStates::open_file(&path, PageCount::new(other)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(PageStates::open_file(&link, pages).is_err());
    }

    #[test]
    fn a_table_on_disk_or_beyond_the_memory_of_its_tmpfs_is_not_made() {
        let dir = in_memory();
        let path = dir.path().join("pages");
        let free = nix::sys::statvfs::statvfs(dir.path()).unwrap();
        let more = free.blocks() * free.fragment_size() + 1;
        assert!(more > 1, "/dev/shm has no end");
        assert!(PageStates::create_file(&path, PageCount::new(more)).is_err());
        assert!(!path.exists());
        let Ok(disk) = tempfile::tempdir() else {
            return;
        };
        if crate::sys::state_map::holds_files(disk.path()).unwrap() {
            return println!("skipped: temporary files are in memory here");
        }
        let path = disk.path().join("pages");
        let error = PageStates::create_file(&path, PageCount::new(1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert!(!path.exists());
    }

    #[test]
    fn a_read_that_died_with_its_engine_is_missing_again() {
        let table = PageStates::create(PageCount::new(4)).unwrap();
        table.set(PageIndex::new(1), PageState::Reading);
        table.set(PageIndex::new(2), PageState::Clean);
        table.forget_reads();
        assert_eq!(table.get(PageIndex::new(1)), PageState::Missing);
        assert_eq!(table.get(PageIndex::new(2)), PageState::Clean);
    }
}
