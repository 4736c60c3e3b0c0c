//! `working-set`: the pages that a restore touches, in first-touch order, as runs.
//!
//! Recorded after a build was published, replayed behind the faults of later restores. It is
//! advice: whatever is wrong with it costs speed and nothing else. So reading one is no
//! `Result`; a file that doesn't fit is [`Ignored`](WorkingSetFile::Ignored), with a reason to
//! count and to log.
//!
//! Invariant: the runs of a [`WorkingSet`] lie in the memory of the build it was made for, and no
//! page is in two of them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use serde::Serialize;

use crate::build::Build;
use crate::build_id::BuildId;
use crate::build_store::BuildStore;
use crate::error::{Fault, FormatError};
use crate::manifest::file_name;
use crate::memory_map::MemoryMap;
use crate::storage::write_new_file;
use crate::units::{Generation, PageCount, PageIndex};
use crate::working_set_file::{MAX_FILE_BYTES, decode, encode};

/// The most runs of one working set; a longer recording keeps the first.
pub const MAX_WORKING_SET_RUNS: usize = 65_536;

/// Consecutive pages: touched one after the other, or changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PageRun {
    /// The first page.
    pub start: PageIndex,
    /// How many; at least one.
    pub pages: PageCount,
}

/// What a restore of one build touches first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    pub(crate) runs: Vec<PageRun>,
}

/// What there is to replay.
#[derive(Debug)]
#[must_use = "an ignored working set wants to be counted"]
pub enum WorkingSetFile {
    /// Nobody recorded one.
    Missing,
    /// One of this build.
    Present(WorkingSet),
    /// There is a file, and it is of no use.
    Ignored(IgnoredWorkingSet),
}

/// Why a working set is ignored.
#[derive(Debug, thiserror::Error)]
pub enum IgnoredWorkingSet {
    /// It was recorded for another build, or for another map under the same id.
    #[error("Working set is of build {build_id}, generation {generation}")]
    Stale {
        /// The build it was recorded for.
        build_id: BuildId,
        /// The generation of that build.
        generation: Generation,
    },
    /// It fails its checksum or breaks a rule.
    #[error("{0}")]
    Corrupt(Box<Fault>),
    /// It is of a version, or uses a feature, that this reader doesn't know.
    #[error("Unsupported {what} {found} of a working set")]
    Unsupported {
        /// The field that says so.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// It can't be read.
    #[error("Reading a working set")]
    Unreadable(#[source] io::Error),
}

impl WorkingSet {
    /// The runs of pages in the order they were touched first.
    ///
    /// Pages outside the memory and later touches of a page are left out. At most `max_pages`
    /// pages and [`MAX_WORKING_SET_RUNS`] runs are kept: the first.
    pub fn record(
        map: &MemoryMap,
        touches: impl IntoIterator<Item = PageIndex>,
        max_pages: PageCount,
    ) -> Self {
        let mut seen = std::collections::HashSet::new();
        let mut runs: Vec<PageRun> = Vec::new();
        for page in touches {
            if page.get() >= map.memory_pages().get() || seen.contains(&page) {
                continue;
            }
            if seen.len() as u64 >= max_pages.get() {
                break;
            }
            let one = PageCount::new(1);
            match runs.last_mut() {
                Some(last) if last.start + last.pages == page => last.pages = last.pages + one,
                _ => {
                    if runs.len() == MAX_WORKING_SET_RUNS {
                        break;
                    }
                    let (start, pages) = (page, one);
                    runs.push(PageRun { start, pages });
                }
            }
            seen.insert(page);
        }
        Self { runs }
    }

    /// The runs, in first-touch order.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// The pages of all runs together.
    pub fn pages(&self) -> PageCount {
        self.runs.iter().map(|run| run.pages).sum()
    }

    /// The file for a build with this map.
    pub fn to_bytes(&self, map: &MemoryMap) -> Vec<u8> {
        encode(&self.runs, map)
    }

    /// Judges a file that is in memory, for a build with this map; `name` is what faults call it.
    pub fn from_bytes(bytes: &[u8], map: &MemoryMap, name: &Path) -> WorkingSetFile {
        match decode(bytes, map, name) {
            Ok(runs) => WorkingSetFile::Present(Self { runs }),
            Err(ignored) => WorkingSetFile::Ignored(ignored),
        }
    }
}

impl Build {
    /// The working set that was recorded for this build.
    pub fn working_set(&self) -> WorkingSetFile {
        read_working_set(self.dir(), self.map())
    }
}

impl BuildStore {
    /// Records a working set for a build, in place of an earlier one.
    ///
    /// It replaces the file by a rename, so whoever reads at the same time has the old one or the
    /// new. One recording of a build may be written at a time.
    ///
    /// # Errors
    /// [`FormatError::Io`], among others if the build was removed meanwhile.
    pub fn write_working_set(&self, build: &Build, set: &WorkingSet) -> Result<(), FormatError> {
        let (storage, temporary) = (self.storage(), self.working_set_temporary(&build.id()));
        write_new_file(&**storage, &temporary, &set.to_bytes(build.map()))?;
        storage
            .sync_file(&temporary)
            .map_err(FormatError::io("Syncing", &temporary))?;
        let path = self.path(&build.id()).join(file_name::WORKING_SET);
        storage.rename(&temporary, &path).map_err(|error| {
            // Where the build is gone, nobody would ever look for it.
            let _ = fs::remove_file(&temporary);
            FormatError::io("Renaming", &temporary)(error)
        })
    }
}

/// The working set in a build's directory.
pub(crate) fn read_working_set(dir: &Path, map: &MemoryMap) -> WorkingSetFile {
    let path = dir.join(file_name::WORKING_SET);
    let read = || {
        let mut bytes = Vec::new();
        // One byte more than there may be, for a longer file to be noticed.
        File::open(&path)?
            .take(MAX_FILE_BYTES as u64 + 1)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) => WorkingSet::from_bytes(&bytes, map, &path),
        Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => WorkingSetFile::Missing,
        Err(error) => WorkingSetFile::Ignored(IgnoredWorkingSet::Unreadable(error)),
    }
}
