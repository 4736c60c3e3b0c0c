//! Merge: a chain rewritten as one build without ancestors, with the same memory.
//!
//! ```text
//!  .merge-<id>/journal ── which memory, and how much of memory.data is durable
//!  .staging-<id>/ ── data ▶ sums ▶ map ▶ other files ── publish ──▶ <id>/ ── journal removed
//! ```
//!
//! The build is staged and published like any other; the journal beside it is what makes the
//! work of a crashed or stopped merge count. The source's files are only read, and every chunk is
//! compared with its sum on the way: a merge doesn't turn rot into content with a good checksum.
//!
//! In memory are one window of pages, 4 MiB of read buffer, and a few bytes per chunk of all data
//! involved.

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::Path;

use crate::build::Build;
use crate::build_id::BuildId;
use crate::build_store::BuildStore;
use crate::chunk_source::ChunkSource;
use crate::encoding::Encoding;
use crate::error::FormatError;
use crate::file_copy::copy_file;
use crate::manifest::{Manifest, file_name};
use crate::map_header::BuildEntry;
use crate::merge_attempt::{Attempt, JOURNAL, OpenJournal, remove_attempt};
use crate::merge_journal::{Journal, MergeIdentity};
use crate::merge_map::write_merged_map;
use crate::merge_plan::{Windows, stored_pages};
use crate::merged_data::MergedData;
use crate::staging::{PublishInfo, Published, Staging};
use crate::storage::{Storage, write_new_file};
use crate::sums::CHUNK_BYTES;
use crate::units::{Generation, PageCount};

/// How much is written at a time.
const WRITE_BYTES: usize = 1 << 20;

/// How a merge goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeOptions {
    /// How much memory is gathered before it is written in one piece; rounded up to a page and to
    /// a chunk. The longer the chain, the more a large window helps: each of its builds is read
    /// once per window.
    pub window_bytes: u64,
    /// How much content is written between two points from which a crashed merge goes on.
    pub checkpoint_bytes: u64,
    /// How the merged build is stored. Any but [`Encoding::Raw`] makes a cold build, which only
    /// [`BuildStore::open_cold`] opens.
    pub encoding: Encoding,
}

/// How far a merge is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeProgress {
    /// Pages that are written, those of an earlier attempt included.
    pub written: PageCount,
    /// Pages that will be.
    pub total: PageCount,
    /// Pages that an earlier attempt had written.
    pub resumed: PageCount,
    /// What this attempt has read of the chain's data, in bytes.
    pub bytes_read: u64,
}

/// How a merge ended that didn't fail.
#[derive(Clone, Debug)]
pub enum MergeOutcome {
    /// The merged build is in the store.
    Published(Published, MergeProgress),
    /// The callback stopped it. Merging again goes on from there.
    Stopped(MergeProgress),
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self {
            window_bytes: 32 << 20,
            checkpoint_bytes: 256 << 20,
            encoding: Encoding::Raw,
        }
    }
}

impl BuildStore {
    /// Writes and publishes a base with the memory and all other files of `source`.
    ///
    /// `progress` is called after each window, and stops the merge by breaking. If an attempt to
    /// merge the same source into the same id was stopped or crashed, this one goes on from its
    /// last checkpoint. One merge into an id may run at a time.
    ///
    /// # Errors
    /// [`FormatError::AlreadyExists`], [`FormatError::NilBuildId`], [`FormatError::Corrupt`] if
    /// anything of the source is not what its checksum says, whatever publishing says, or
    /// [`FormatError::Io`]. What is written stays for another attempt, or for
    /// [`BuildStore::abandon_merge`].
    pub fn merge(
        &self,
        source: &Build,
        id: BuildId,
        info: PublishInfo,
        options: &MergeOptions,
        progress: &mut dyn FnMut(MergeProgress) -> ControlFlow<()>,
    ) -> Result<MergeOutcome, FormatError> {
        let identity = MergeIdentity::new(id, source.map(), options.encoding);
        if let Some(published) = self.published_merge(&identity)? {
            let total = stored_pages(source.map());
            let progress = MergeProgress {
                written: total,
                total,
                resumed: total,
                bytes_read: 0,
            };
            return Ok(MergeOutcome::Published(published, progress));
        }
        let mut merge = Merge::open(self, source, &identity, options)?;
        if merge.copy_pages(progress)?.is_break() {
            return Ok(MergeOutcome::Stopped(merge.progress()));
        }
        let progress = merge.progress();
        let published = merge.publish(info)?;
        self.remove_merge_dir(&id)?;
        Ok(MergeOutcome::Published(published, progress))
    }

    /// The merges that were stopped or crashed: the build to be, and the one that is merged.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn unfinished_merges(&self) -> Result<Vec<(BuildId, Option<BuildId>)>, FormatError> {
        let source = |id: &BuildId| {
            let journal = fs::read(self.merge_dir(id).join(JOURNAL)).ok()?;
            Journal::source(&journal)
        };
        let ids = self.merge_ids()?;
        Ok(ids.into_iter().map(|id| (id, source(&id))).collect())
    }

    /// Removes what an unfinished merge has written.
    ///
    /// # Errors
    /// [`FormatError::NotFound`] or [`FormatError::Io`].
    pub fn abandon_merge(&self, id: &BuildId) -> Result<(), FormatError> {
        if !self.merge_dir(id).is_dir() {
            return Err(FormatError::NotFound { build_id: *id });
        }
        remove_attempt(self, id)
    }

    /// The build, if this merge crashed after it had published; what it left is removed.
    fn published_merge(&self, identity: &MergeIdentity) -> Result<Option<Published>, FormatError> {
        let id = identity.build_id;
        let journal = fs::read(self.merge_dir(&id).join(JOURNAL)).ok();
        let journal = journal.and_then(|bytes| Journal::decode(&bytes, identity));
        if journal.is_none() || !self.contains(&id) {
            return Ok(None);
        }
        let dir = self.path(&id);
        let manifest = Manifest::open(&dir.join(file_name::MANIFEST))?;
        self.remove_merge_dir(&id)?;
        Ok(Some(Published { dir, manifest }))
    }

    fn remove_merge_dir(&self, id: &BuildId) -> Result<(), FormatError> {
        self.remove_dir(&self.merge_dir(id))?;
        self.sync_root()
    }
}

/// A merge that is under way.
struct Merge<'a> {
    store: &'a BuildStore,
    source: &'a Build,
    staging: Staging,
    journal: OpenJournal,
    data: File,
    reader: ChunkSource,
    content: MergedData,
    window: PageCount,
    checkpoint_bytes: u64,
    total: PageCount,
    resumed: PageCount,
}

impl<'a> Merge<'a> {
    /// Goes on where the journal says, or begins.
    fn open(
        store: &'a BuildStore,
        source: &'a Build,
        identity: &MergeIdentity,
        options: &MergeOptions,
    ) -> Result<Self, FormatError> {
        let page_size = source.map().page_size();
        // Windows end with a page and with a chunk, both of which are powers of two.
        let unit = page_size.bytes().max(CHUNK_BYTES.into());
        let window_bytes = options.window_bytes.max(1).next_multiple_of(unit);
        let Attempt {
            staging,
            journal,
            written,
        } = Attempt::open(store, identity, unit)?;
        let content = MergedData::resume(identity.encoding, written);
        let resumed = content.content_bytes() / page_size.bytes();
        Ok(Self {
            store,
            source,
            data: open_data(store, &staging)?,
            staging,
            journal,
            reader: ChunkSource::new(source.clone()),
            content,
            window: PageCount::new(window_bytes / page_size.bytes()),
            checkpoint_bytes: options.checkpoint_bytes,
            total: stored_pages(source.map()),
            resumed: PageCount::new(resumed),
        })
    }

    fn progress(&self) -> MergeProgress {
        let page_size = self.source.map().page_size();
        MergeProgress {
            written: PageCount::new(self.content.content_bytes() / page_size.bytes()),
            total: self.total,
            resumed: self.resumed,
            bytes_read: self.reader.bytes_read(),
        }
    }

    fn copy_pages(
        &mut self,
        progress: &mut dyn FnMut(MergeProgress) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, FormatError> {
        let map = self.source.map();
        let extents = map.all_extents();
        let mut windows = Windows::new(extents, map.page_size(), self.window, self.resumed);
        let path = self.staging.file_path(file_name::DATA);
        let mut durable = self.content.content_bytes();
        let (mut placed, mut window) = (Vec::new(), Vec::new());
        loop {
            let pages = windows.next_into(&mut placed);
            if pages.is_zero() {
                return Ok(ControlFlow::Continue(()));
            }
            let bytes = pages.bytes(map.page_size());
            let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
            window.resize(bytes.expect("a window fits memory"), 0);
            self.reader.read(&mut placed, &mut window)?;
            let (at, stored) = self.content.append(&window);
            write_in_pieces(&**self.store.storage(), &self.data, &path, at, stored)?;
            let flow = progress(self.progress());
            if flow.is_break() || self.content.content_bytes() - durable >= self.checkpoint_bytes {
                let storage = &**self.store.storage();
                self.journal
                    .checkpoint(storage, &path, self.content.complete())?;
                durable = self.content.content_bytes();
            }
            if flow.is_break() {
                return Ok(flow);
            }
        }
    }

    /// Writes the other files, and makes all of them a build.
    fn publish(mut self, info: PublishInfo) -> Result<Published, FormatError> {
        let map = self.source.map();
        let storage = &**self.store.storage();
        let data_pages = self.progress().written;
        let (sums, sums_crc) = self.content.finish(self.staging.build_id());
        let path = self.staging.file_path(file_name::SUMS);
        write_new_file(storage, &path, &sums)?;
        let own = BuildEntry {
            id: self.staging.build_id(),
            generation: Generation::BASE,
            data_pages,
            sums_crc,
        };
        write_merged_map(storage, &self.staging.file_path(file_name::MAP), map, &own)?;
        for (name, entry) in &self.source.manifest().files {
            if ![file_name::DATA, file_name::SUMS, file_name::MAP].contains(&name.as_str()) {
                let (from, to) = (self.source.dir().join(name), self.staging.file_path(name));
                copy_file(storage, &from, &to, entry)?;
                self.staging.register(name, *entry);
            }
        }
        self.staging.publish(info)
    }
}

/// Writes a window, with the disk at work on its beginning while the rest is still copied.
///
/// A write of several MiB would have the page cache look for as large blocks of free memory, which
/// a virtual machine may have to get from its host first: that halves the rate.
fn write_in_pieces(
    storage: &dyn Storage,
    file: &File,
    path: &Path,
    at: u64,
    bytes: &[u8],
) -> Result<(), FormatError> {
    let mut at = at;
    for piece in bytes.chunks(WRITE_BYTES) {
        storage
            .write_at(file, path, at, piece)
            .map_err(FormatError::io("Writing", path))?;
        storage.start_writeback(file, at, piece.len() as u64);
        at += piece.len() as u64;
    }
    Ok(())
}

/// The staged `memory.data`, with whatever it has already; its name is durable.
fn open_data(store: &BuildStore, staging: &Staging) -> Result<File, FormatError> {
    let (storage, path) = (store.storage(), staging.file_path(file_name::DATA));
    let data = if path.exists() {
        storage.open_file(&path)
    } else {
        storage.create_file(&path)
    };
    let data = data.map_err(FormatError::io("Creating", &path))?;
    storage
        .sync_dir(staging.dir())
        .map_err(FormatError::io("Syncing", staging.dir()))?;
    Ok(data)
}
