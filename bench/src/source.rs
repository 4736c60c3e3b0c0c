//! The build that subjects serve from: every page has content, and says which page it is.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize};
use snapshot_format::{
    BuildId, BuildStore, PageCount, PageIndex, PageSize, PublishInfo, WorkingSet, file_name,
};
use tempfile::TempDir;
use uffd_engine::sys::mapping::SourceMapping;

use crate::config::PAGE_BYTES;

const BUILD: BuildId = BuildId::from_bytes(*b"bench page fault");
/// Pages asked about at once: as many as a [`SourceMapping`] looks at.
const PROBE_BYTES: u64 = 512 * PAGE_BYTES;
const PATTERN: u64 = 0x7E57_0000_0000_0000;

/// What the first word of a page must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Words {
    /// The same on every page: that of the one page the floor copies.
    Hot,
    /// Those of the build.
    OfBuild,
}

impl Words {
    pub(crate) fn of(self, page: u64) -> u64 {
        match self {
            Self::Hot => PATTERN | 0xFFFF_FFFF,
            Self::OfBuild => PATTERN | (page + 1),
        }
    }
}

/// A published build in a directory that goes away with this value.
#[derive(Debug)]
pub(crate) struct Source {
    _dir: TempDir,
    store: BuildStore,
    data: PathBuf,
    mapping: SourceMapping,
    bytes: u64,
}

impl Source {
    /// Writes a build of `pages` pages somewhere under `dir`.
    pub(crate) fn write(dir: &Path, pages: u64) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("bench-builds-")
            .tempdir_in(dir)
            .with_context(|| format!("Making a directory for the build in {}", dir.display()))?;
        let store = BuildStore::open_or_create(dir.path())?;
        let mut staging = store.stage(BUILD)?;
        let mut writer = staging.memory_writer(None, PageSize::Size4K, PageCount::new(pages))?;
        for page in 0..pages {
            let word = Words::OfBuild.of(page).to_le_bytes();
            let content = word.repeat(PAGE_BYTES as usize / word.len());
            writer.pages(PageIndex::new(page), &content)?;
        }
        writer.finish()?;
        std::fs::write(staging.file_path(file_name::VMSTATE), b"no VMM")?;
        staging.add_file(file_name::VMSTATE)?;
        let data = staging
            .publish(PublishInfo::default())?
            .dir
            .join(file_name::DATA);
        let file = File::open(&data)?;
        let bytes = pages * PAGE_BYTES;
        Ok(Self {
            _dir: dir,
            store,
            mapping: SourceMapping::new(&file, bytes).context("Mapping the build")?,
            data,
            bytes,
        })
    }

    pub(crate) fn build(&self) -> BuildId {
        BUILD
    }

    pub(crate) fn store_root(&self) -> &Path {
        self.store.root()
    }

    /// The file with the pages, page `n` at byte `n * 4096`.
    pub(crate) fn data(&self) -> &Path {
        &self.data
    }

    /// Drops the file from the page cache; an error if any of it stays.
    pub(crate) fn evict(&self) -> Result<()> {
        let file = File::open(&self.data)?;
        file.sync_all()?;
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        posix_fadvise(&file, 0, 0, advice).context("Dropping the build")?;
        let mut at = 0;
        while at < self.bytes {
            let len = PROBE_BYTES.min(self.bytes - at);
            let kept = self.mapping.resident_prefix(at, len);
            ensure!(kept == 0, "The file system keeps its pages in memory");
            at += len;
        }
        Ok(())
    }

    /// Writes what a session touched first beside the build, in place of what lies there.
    pub(crate) fn write_working_set(&self, pages: &[u64]) -> Result<()> {
        let build = self.store.open(&BUILD)?;
        let most = PageCount::new(pages.len() as u64);
        let touches = pages.iter().copied().map(PageIndex::new);
        let set = WorkingSet::record(build.map(), touches, most);
        self.store.write_working_set(&build, &set)?;
        Ok(())
    }

    /// Reads the file again if the kernel has let go of any of it.
    pub(crate) fn keep_in_page_cache(&self) -> Result<()> {
        let gone = (0..self.bytes).step_by(PROBE_BYTES as usize).any(|at| {
            let len = PROBE_BYTES.min(self.bytes - at);
            self.mapping.resident_prefix(at, len) < len
        });
        if gone {
            let mut file = File::open(&self.data)?;
            std::io::copy(&mut file, &mut std::io::sink()).context("Reading the build")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_pages_can_be_mistaken_for_each_other_or_for_zero() {
        assert_ne!(Words::OfBuild.of(0), 0);
        assert_ne!(Words::OfBuild.of(0), Words::OfBuild.of(1));
        assert_ne!(Words::OfBuild.of(65_535), Words::Hot.of(65_535));
    }
}
