//! Where the page-state tables of sessions are: in files of the run directory, where that is in
//! memory, so that they outlive daemon and engine; otherwise in nothing but these two.

use std::io;
use std::path::{Path, PathBuf};

use snapshot_format::PageCount;
use uffd_engine::PageStates;
use uffd_engine::sys::state_map::holds_files;

/// The file in a sandbox's directory of sockets.
const FILE: &str = "pages";

/// Where tables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// In files.
    Kept,
    /// Without a name.
    Nameless,
}

impl Tables {
    /// As the run directory allows; says so where it allows less.
    #[must_use]
    pub fn of(run_dir: &Path) -> Self {
        match holds_files(run_dir) {
            Ok(true) => Self::Kept,
            found => {
                tracing::warn!(
                    run_dir = %run_dir.display(),
                    error = found.err().map(tracing::field::display),
                    "run_dir is on no tmpfs: if daemon and engines die at once, restored guests are \
                     lost; have it on one, as /run is"
                );
                Self::Nameless
            }
        }
    }

    /// A new table for the session of the sandbox with this directory of sockets.
    ///
    /// # Errors
    /// The host is out of memory or descriptors.
    pub fn make(self, dir: &Path, pages: PageCount) -> io::Result<PageStates> {
        if self == Self::Kept {
            let path = path(dir);
            match PageStates::create_file(&path, pages) {
                Ok(states) => return Ok(states),
                Err(error) => tracing::warn!(
                    path = %path.display(),
                    %error,
                    "A guest would not outlive daemon and engine at once"
                ),
            }
        }
        PageStates::create(pages)
    }
}

/// Where the table is of the sandbox with this directory of sockets, if it is in a file.
#[must_use]
pub fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_in_files_where_those_are_in_memory() {
        let pages = PageCount::new(5);
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let kept = Tables::of(memory.path());
        assert_eq!(kept, Tables::Kept);
        let states = kept.make(memory.path(), pages).unwrap();
        assert_eq!(states.pages(), pages);
        drop(states);
        assert!(PageStates::open_file(&path(memory.path()), pages).is_ok());
        // Its place is taken: it goes without.
        assert_eq!(kept.make(memory.path(), pages).unwrap().pages(), pages);

        assert_eq!(Tables::of(Path::new("/proc")), Tables::Nameless);
        assert_eq!(Tables::of(Path::new("/missing")), Tables::Nameless);
        let dir = memory.path().join("dir");
        std::fs::create_dir(&dir).unwrap();
        Tables::Nameless.make(&dir, pages).unwrap();
        assert!(!path(&dir).exists());
    }
}
