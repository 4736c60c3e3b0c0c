//! Import: the builds of an export stream, verified and published, ancestors first.
//!
//! ```text
//!  export.json ─▶ for each build: manifest.json ─▶ its files ─▶ checksums ─▶ publish
//! ```
//!
//! Each entry has to be the one that index and manifest call for, in that order, of that size.
//! A build is published after all of its bytes were compared with their checksums, and only if
//! its map names no builds but those before it in the stream: one that names another build of
//! this store would read that one's memory. If anything is wrong, the builds that were published
//! on the way are removed again.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use crate::build::disagreement;
use crate::build_id::BuildId;
use crate::build_store::BuildStore;
use crate::data_check::check_data;
use crate::error::FormatError;
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest, file_name};
use crate::memory_map::MemoryMap;
use crate::staging::{PublishInfo, Staging};
use crate::stream_file::{receive_file, skip_file};
use crate::stream_layout::{INDEX_NAME, MAX_INDEX_BYTES, StreamIndex, entry_name, unexpected};
use crate::stream_reader::StreamReader;
use crate::sums::DataSums;
use crate::working_set::{WorkingSet, WorkingSetFile};
use crate::working_set_file::MAX_FILE_BYTES;

/// What an import accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImportOptions {
    /// The most bytes that the files of all builds together may have, holes included.
    pub max_bytes: u64,
}

/// What an import came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportSummary {
    /// The build that the stream is for.
    pub build: BuildId,
    /// The builds that were published, ancestors first.
    pub published: Vec<BuildId>,
    /// Builds of the stream that were in the store already, with the same manifest.
    pub present: Vec<BuildId>,
}

impl Default for ImportOptions {
    /// One tebibyte.
    fn default() -> Self {
        Self { max_bytes: 1 << 40 }
    }
}

impl BuildStore {
    /// Reads a stream that [`BuildStore::export`] wrote, from whoever sent it.
    ///
    /// # Errors
    /// [`FormatError::StreamContent`], [`FormatError::StreamTruncated`] or
    /// [`FormatError::StreamTooLarge`] if the stream is not one;
    /// [`FormatError::Corrupt`] if a file is not what its checksum says;
    /// [`FormatError::AlreadyExists`] if the store has another build under an id of the stream;
    /// whatever publishing says. No build of the stream was published then that was not there.
    pub fn import(
        &self,
        from: impl Read,
        options: &ImportOptions,
    ) -> Result<ImportSummary, FormatError> {
        let mut archive = tar::Archive::new(from);
        let mut stream = StreamReader::new(&mut archive)?;
        let index = stream.take_bytes(INDEX_NAME, MAX_INDEX_BYTES)?;
        let index = StreamIndex::from_bytes(&index)?;
        let mut import = Import {
            store: self,
            stream,
            bytes_left: options.max_bytes,
            seen: BTreeSet::new(),
            summary: ImportSummary {
                build: index.build,
                published: Vec::new(),
                present: Vec::new(),
            },
        };
        let imported = import.builds(&index.builds);
        if imported.is_err() {
            import.take_back();
        }
        imported.map(|()| import.summary)
    }
}

struct Import<'a, R: Read> {
    store: &'a BuildStore,
    stream: StreamReader<'a, R>,
    bytes_left: u64,
    /// Builds of the stream so far.
    seen: BTreeSet<BuildId>,
    summary: ImportSummary,
}

impl<R: Read> Import<'_, R> {
    fn builds(&mut self, ids: &[BuildId]) -> Result<(), FormatError> {
        for id in ids {
            let manifest = self.manifest(id)?;
            self.seen.insert(*id);
            if self.store.contains(id) {
                self.present(id, &manifest)?;
            } else {
                self.publish(id, &manifest)?;
            }
        }
        self.stream.end()
    }

    fn manifest(&mut self, id: &BuildId) -> Result<Manifest, FormatError> {
        let name = entry_name(id, file_name::MANIFEST);
        let bytes = self.stream.take_bytes(&name, MAX_MANIFEST_BYTES)?;
        let manifest = Manifest::from_bytes(&bytes, Path::new(&name))?;
        if manifest.build_id != *id {
            return Err(unexpected(&name, format!("build {id}"), manifest.build_id));
        }
        for (file, entry) in &manifest.files {
            let left = self.bytes_left.checked_sub(entry.bytes);
            self.bytes_left = left.ok_or_else(|| FormatError::StreamTooLarge {
                entry: entry_name(id, file),
                bytes: entry.bytes,
                limit: self.bytes_left,
            })?;
        }
        Ok(manifest)
    }

    /// Skips a build that the store has.
    fn present(&mut self, id: &BuildId, manifest: &Manifest) -> Result<(), FormatError> {
        let path = self.store.path(id);
        if Manifest::open(&path.join(file_name::MANIFEST))? != *manifest {
            let build_id = *id;
            return Err(FormatError::AlreadyExists { build_id, path });
        }
        for (name, entry) in &manifest.files {
            skip_file(&mut self.stream, id, name, entry)?;
        }
        self.working_set_bytes(id)?;
        self.summary.present.push(*id);
        Ok(())
    }

    fn publish(&mut self, id: &BuildId, manifest: &Manifest) -> Result<(), FormatError> {
        let mut staging = self.store.stage(*id)?;
        for (name, entry) in &manifest.files {
            let path = staging.file_path(name);
            let storage = &**self.store.storage();
            receive_file(&mut self.stream, storage, id, (name, entry), &path)?;
            // The memory's own files register themselves.
            if ![file_name::MAP, file_name::SUMS, file_name::DATA].contains(&name.as_str()) {
                staging.register(name, *entry);
            }
        }
        self.check_memory(&staging, id, manifest)?;
        let working_set = self.working_set_bytes(id)?;
        staging.publish(PublishInfo {
            created_at_ms: manifest.created_at_ms,
            vmm: manifest.vmm.clone(),
            labels: manifest.labels.clone(),
        })?;
        self.summary.published.push(*id);
        if let Some(bytes) = working_set {
            let build = self.store.open_cold(id)?;
            let name = Path::new(file_name::WORKING_SET);
            // Advice from afar is taken if it fits, and no reason to refuse a build if not.
            if let WorkingSetFile::Present(set) = WorkingSet::from_bytes(&bytes, build.map(), name)
            {
                self.store.write_working_set(&build, &set)?;
            }
        }
        Ok(())
    }

    /// That map and manifest agree, that the map takes pages from nobody else, and that the data
    /// is what its sums say.
    fn check_memory(
        &self,
        staging: &Staging,
        id: &BuildId,
        manifest: &Manifest,
    ) -> Result<(), FormatError> {
        let map = MemoryMap::open(&staging.file_path(file_name::MAP))?;
        let manifest_path = staging.file_path(file_name::MANIFEST);
        if let Some(fault) = disagreement(&manifest_path, *id, manifest, &map) {
            return Err(fault.into());
        }
        let foreign = map
            .builds()
            .iter()
            .find(|entry| !self.seen.contains(&entry.id));
        if let Some(foreign) = foreign {
            let expected = "a map that names builds before it in the stream";
            let name = entry_name(id, file_name::MAP);
            return Err(unexpected(&name, expected, format!("build {}", foreign.id)));
        }
        let sums = DataSums::open(&staging.file_path(file_name::SUMS))?;
        let mut first = None;
        let mut fault = |fault| {
            first.get_or_insert(fault);
        };
        let path = staging.file_path(file_name::DATA);
        check_data(&path, &sums, &mut fault, &mut |_| {})?;
        first.map_or(Ok(()), |fault| Err(fault.into()))
    }

    /// The working set, if the stream has one for this build.
    fn working_set_bytes(&mut self, id: &BuildId) -> Result<Option<Vec<u8>>, FormatError> {
        let name = entry_name(id, file_name::WORKING_SET);
        if self.stream.peek()? != Some(name.as_str()) {
            return Ok(None);
        }
        self.stream
            .take_bytes(&name, MAX_FILE_BYTES as u64)
            .map(Some)
    }

    /// Removes what this import published, descendants first.
    fn take_back(&mut self) {
        for id in self.summary.published.drain(..).rev() {
            // What can't be removed stays, whole and unreferenced.
            let _ = self.store.remove(&id);
        }
    }
}
