//! Where an attempt to merge stands: its journal, its staging directory, and what of the data in
//! there can be kept.
//!
//! A journal without staging directory, of another merge, or unreadable counts as none, and the
//! attempt begins from the start. What a journal says is compared with the data before it is
//! believed, so resuming reads what was written once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::build_id::BuildId;
use crate::build_store::BuildStore;
use crate::error::FormatError;
use crate::manifest::file_name;
use crate::merge_journal::{Journal, MergeIdentity, encode_record};
use crate::sparse::range_checksum;
use crate::staging::Staging;
use crate::storage::Storage;
use crate::stored_chunk::{StoredChunk, offsets};
use crate::sums::CHUNK_BYTES;

pub(crate) const JOURNAL: &str = "journal";

/// An attempt that can go on.
pub(crate) struct Attempt {
    pub(crate) staging: Staging,
    pub(crate) journal: OpenJournal,
    /// The chunks that are written already.
    pub(crate) written: Vec<StoredChunk>,
}

/// A journal, to be appended to.
#[derive(Debug)]
pub(crate) struct OpenJournal {
    file: File,
    path: PathBuf,
    bytes: u64,
    /// Chunks that it says are durable.
    chunks: usize,
}

impl Attempt {
    /// Goes on where the journal says, or begins. Data is kept in multiples of `unit` bytes,
    /// which is one of a chunk.
    pub(crate) fn open(
        store: &BuildStore,
        identity: &MergeIdentity,
        unit: u64,
    ) -> Result<Self, FormatError> {
        let id = identity.build_id;
        if id.is_nil() {
            return Err(FormatError::NilBuildId);
        }
        if store.contains(&id) {
            let path = store.path(&id);
            return Err(FormatError::AlreadyExists { build_id: id, path });
        }
        let path = store.merge_dir(&id).join(JOURNAL);
        let journal = fs::read(&path).ok();
        let journal = journal.and_then(|bytes| Journal::decode(&bytes, identity));
        match journal {
            Some(journal) if store.staging_dir(&id).is_dir() => {
                Self::resume(store, identity, journal, unit)
            }
            _ => Self::begin(store, identity),
        }
    }

    fn resume(
        store: &BuildStore,
        identity: &MergeIdentity,
        mut journal: Journal,
        unit: u64,
    ) -> Result<Self, FormatError> {
        let id = identity.build_id;
        let (dir, path) = (store.staging_dir(&id), store.merge_dir(&id).join(JOURNAL));
        let good = good_chunks(&dir.join(file_name::DATA), &journal.chunks);
        let per_unit = usize::try_from(unit / u64::from(CHUNK_BYTES)).expect("a page is small");
        let keep = good - good % per_unit;
        let open = if keep == journal.chunks.len() {
            let file = store.storage().open_file(&path);
            OpenJournal {
                file: file.map_err(FormatError::io("Opening", &path))?,
                path,
                bytes: journal.bytes,
                chunks: keep,
            }
        } else {
            journal.chunks.truncate(keep);
            OpenJournal::create(&**store.storage(), path, identity, &journal.chunks)?
        };
        Ok(Self {
            staging: Staging::resumable(store.clone(), id, dir),
            journal: open,
            written: journal.chunks,
        })
    }

    fn begin(store: &BuildStore, identity: &MergeIdentity) -> Result<Self, FormatError> {
        let (id, storage) = (identity.build_id, &**store.storage());
        let (staging, dir) = (store.staging_dir(&id), store.merge_dir(&id));
        if dir.is_dir() {
            remove_attempt(store, &id)?;
        } else if staging.exists() {
            let (build_id, path) = (id, staging);
            return Err(FormatError::AlreadyExists { build_id, path });
        }
        storage
            .create_dir(&dir)
            .map_err(FormatError::io("Creating", &dir))?;
        let journal = OpenJournal::create(storage, dir.join(JOURNAL), identity, &[])?;
        storage
            .sync_dir(&dir)
            .map_err(FormatError::io("Syncing", &dir))?;
        storage
            .create_dir(&staging)
            .map_err(FormatError::io("Creating", &staging))?;
        store.sync_root()?;
        Ok(Self {
            staging: Staging::resumable(store.clone(), id, staging),
            journal,
            written: Vec::new(),
        })
    }
}

/// Removes the staging directory of a merge, and then its journal.
pub(crate) fn remove_attempt(store: &BuildStore, id: &BuildId) -> Result<(), FormatError> {
    let staging = store.staging_dir(id);
    if staging.is_dir() {
        store.remove_dir(&staging)?;
    }
    store.remove_dir(&store.merge_dir(id))?;
    store.sync_root()
}

impl OpenJournal {
    /// A journal that says that these chunks are durable.
    fn create(
        storage: &dyn Storage,
        path: PathBuf,
        identity: &MergeIdentity,
        durable: &[StoredChunk],
    ) -> Result<Self, FormatError> {
        let mut bytes = identity.encode();
        if !durable.is_empty() {
            bytes.extend_from_slice(&encode_record(durable));
        }
        let file = storage
            .create_file(&path)
            .map_err(FormatError::io("Creating", &path))?;
        storage
            .write_at(&file, &path, 0, &bytes)
            .map_err(FormatError::io("Writing", &path))?;
        storage
            .sync_file(&path)
            .map_err(FormatError::io("Syncing", &path))?;
        Ok(Self {
            file,
            path,
            bytes: bytes.len() as u64,
            chunks: durable.len(),
        })
    }

    /// Makes these chunks, all that are written, durable, and then says so.
    pub(crate) fn checkpoint(
        &mut self,
        storage: &dyn Storage,
        data: &Path,
        written: &[StoredChunk],
    ) -> Result<(), FormatError> {
        let new = &written[self.chunks..];
        if new.is_empty() {
            return Ok(());
        }
        storage
            .sync_file(data)
            .map_err(FormatError::io("Syncing", data))?;
        let record = encode_record(new);
        storage
            .write_at(&self.file, &self.path, self.bytes, &record)
            .map_err(FormatError::io("Writing", &self.path))?;
        storage
            .sync_file(&self.path)
            .map_err(FormatError::io("Syncing", &self.path))?;
        self.bytes += record.len() as u64;
        self.chunks += new.len();
        Ok(())
    }
}

/// How many chunks at the beginning of a file are what the journal says.
fn good_chunks(data: &Path, chunks: &[StoredChunk]) -> usize {
    let Ok(file) = File::open(data) else {
        return 0;
    };
    let written = file.metadata().map_or(0, |metadata| metadata.len());
    let good = |&(bytes, chunk): &(&[u64], &StoredChunk)| {
        let bytes = bytes[0]..bytes[1];
        let crc = chunk.stored_crc;
        bytes.end <= written && range_checksum(&file, bytes).is_ok_and(|found| found == crc)
    };
    let offsets = offsets(chunks);
    offsets.windows(2).zip(chunks).take_while(good).count()
}
