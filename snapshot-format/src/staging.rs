//! A build on its way into the store.
//!
//! Files are written into a directory of their own, by this crate or by a VMM; `publish` makes
//! them a build in the order that FORMAT.md argues for: every file durable, then their
//! directory, then the name, then the store. Until the rename there is no new build, from then
//! on there is a whole one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::build_id::BuildId;
use crate::build_store::BuildStore;
use crate::data_file::DataFile;
use crate::error::{Fault, FormatError};
use crate::manifest::{FileEntry, Manifest, MemoryShape, check_name, file_name};
use crate::memory_map::MemoryMap;
use crate::sparse::file_checksum;
use crate::storage::write_new_file;

/// What the publisher says about a build; the rest of the manifest follows from its files.
#[derive(Clone, Debug, Default)]
pub struct PublishInfo {
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    /// The VMM that wrote `vmstate`: its name, version, CPU.
    pub vmm: BTreeMap<String, String>,
    /// Whatever has to be known again on resume: vCPU count, kernel, template.
    pub labels: BTreeMap<String, String>,
}

/// A build that was published.
#[derive(Clone, Debug)]
pub struct Published {
    /// Its directory.
    pub dir: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
}

/// A staging directory; dropping it unpublished removes it, unless it belongs to a merge, which
/// can go on.
#[derive(Debug)]
pub struct Staging {
    store: BuildStore,
    build_id: BuildId,
    dir: PathBuf,
    files: BTreeMap<String, FileEntry>,
    published: bool,
    /// Whether the directory stays for another attempt.
    resumable: bool,
}

impl Staging {
    pub(crate) fn new(store: BuildStore, build_id: BuildId, dir: PathBuf) -> Self {
        Self {
            store,
            build_id,
            dir,
            files: BTreeMap::new(),
            published: false,
            resumable: false,
        }
    }

    /// A directory that is there, and that stays if this is dropped.
    pub(crate) fn resumable(store: BuildStore, build_id: BuildId, dir: PathBuf) -> Self {
        let mut staging = Self::new(store, build_id, dir);
        staging.resumable = true;
        staging
    }

    /// The id that the build will have.
    pub fn build_id(&self) -> BuildId {
        self.build_id
    }

    /// The directory, for a VMM to write into.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a file of this name belongs.
    pub fn file_path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn store(&self) -> &BuildStore {
        &self.store
    }

    /// Registers a file that was written into the directory: its length and checksum go into
    /// the manifest. The `memory.*` files register themselves.
    ///
    /// # Errors
    /// [`FormatError::FileName`] or [`FormatError::Io`].
    pub fn add_file(&mut self, name: &str) -> Result<FileEntry, FormatError> {
        check_name(name)?;
        if [file_name::MAP, file_name::DATA, file_name::SUMS].contains(&name) {
            let name = name.to_owned();
            return Err(FormatError::FileName { name });
        }
        let entry = checked_entry(&self.file_path(name))?;
        self.files.insert(name.to_owned(), entry);
        Ok(entry)
    }

    /// Registers a file that was registered before, in another build, under whatever name, and
    /// is the same file still: it isn't read for its checksum again.
    ///
    /// # Errors
    /// [`FormatError::FileName`].
    pub fn add_known_file(&mut self, name: &str, entry: FileEntry) -> Result<(), FormatError> {
        check_name(name)?;
        if [file_name::MAP, file_name::DATA, file_name::SUMS].contains(&name)
            || entry.crc32c.is_none()
        {
            let name = name.to_owned();
            return Err(FormatError::FileName { name });
        }
        self.register(name, entry);
        Ok(())
    }

    /// Registers a file whose length and checksum are known.
    pub(crate) fn register(&mut self, name: &str, entry: FileEntry) {
        self.files.insert(name.to_owned(), entry);
    }

    /// Makes the staged files a build.
    ///
    /// The memory files are validated first: what is published can be opened. If this fails,
    /// no build becomes visible and the staging directory is removed; only if the very last
    /// sync fails *and* the rename can't be taken back does a whole build stay.
    ///
    /// # Errors
    /// [`FormatError::Unregistered`] for a file nobody mentioned, whatever opening the build
    /// could say, [`FormatError::ManifestTooLarge`] or [`FormatError::Io`].
    pub fn publish(mut self, info: PublishInfo) -> Result<Published, FormatError> {
        let map = self.check_memory()?;
        let shape = MemoryShape {
            page_size: map.page_size(),
            pages: map.memory_pages(),
        };
        let lineage = (map.parent(), map.generation());
        drop(map);
        let files = std::mem::take(&mut self.files);
        let manifest = Manifest::new(self.build_id, lineage, shape, info, files);
        self.write_manifest(&manifest)?;
        self.sync_files(&manifest)?;
        let dir = self.store.path(&self.build_id);
        self.rename_into_place(&dir)?;
        Ok(Published { dir, manifest })
    }

    /// Validates the memory files as opening the build would, and registers them.
    fn check_memory(&mut self) -> Result<MemoryMap, FormatError> {
        let map_path = self.file_path(file_name::MAP);
        let map = MemoryMap::open(&map_path)?;
        if map.build_id() != self.build_id {
            let (expected, found) = (self.build_id, map.build_id());
            return Err(Fault::new(&map_path, 32, "build id", expected, found).into());
        }
        let data = DataFile::open_all(self.store.root(), &self.dir, &map)?;
        let own = data.last().expect("a table ends with its own build");
        let bytes = own.stored_bytes(map.page_size());
        let sums_path = self.file_path(file_name::SUMS);
        let data_path = self.file_path(file_name::DATA);
        let metadata =
            fs::metadata(&data_path).map_err(FormatError::io("Reading the size of", &data_path))?;
        if metadata.len() != bytes {
            return Err(Fault::new(&data_path, 0, "data length", bytes, metadata.len()).into());
        }
        let data = FileEntry {
            bytes,
            crc32c: None,
        };
        self.files.insert(file_name::DATA.to_owned(), data);
        self.files
            .insert(file_name::MAP.to_owned(), checked_entry(&map_path)?);
        self.files
            .insert(file_name::SUMS.to_owned(), checked_entry(&sums_path)?);
        Ok(map)
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<(), FormatError> {
        let path = self.file_path(file_name::MANIFEST);
        let bytes = manifest.to_bytes()?;
        write_new_file(&**self.store.storage(), &path, &bytes)
    }

    /// Makes every file and then the directory durable; refuses files that nobody registered.
    fn sync_files(&self, manifest: &Manifest) -> Result<(), FormatError> {
        let storage = self.store.storage();
        let entries = fs::read_dir(&self.dir).map_err(FormatError::io("Listing", &self.dir))?;
        for entry in entries {
            let entry = entry.map_err(FormatError::io("Listing", &self.dir))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != file_name::MANIFEST && !manifest.files.contains_key(&name) {
                return Err(FormatError::Unregistered { name });
            }
        }
        for name in manifest
            .files
            .keys()
            .map(String::as_str)
            .chain([file_name::MANIFEST])
        {
            let path = self.file_path(name);
            storage
                .sync_file(&path)
                .map_err(FormatError::io("Syncing", &path))?;
        }
        storage
            .sync_dir(&self.dir)
            .map_err(FormatError::io("Syncing", &self.dir))
    }

    fn rename_into_place(&mut self, dir: &Path) -> Result<(), FormatError> {
        let storage = self.store.storage();
        storage
            .rename(&self.dir, dir)
            .map_err(FormatError::io("Renaming", &self.dir))?;
        self.published = true;
        let Err(error) = self.store.sync_root() else {
            return Ok(());
        };
        // Nobody knows now whether the name survives a crash, so it had better not exist.
        if storage.rename(dir, &self.dir).is_ok() {
            self.published = false;
        }
        Err(error)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published && !self.resumable {
            // What can't be removed now is removed by `remove_staging` at the next start.
            let _ = self.store.storage().remove_dir_all(&self.dir);
        }
    }
}

fn checked_entry(path: &Path) -> Result<FileEntry, FormatError> {
    let (bytes, crc) = file_checksum(path)?;
    Ok(FileEntry {
        bytes,
        crc32c: Some(crc),
    })
}
