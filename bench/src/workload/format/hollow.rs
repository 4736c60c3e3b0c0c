//! Chains of builds without bytes behind them: maps are looked at, page data is not.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use snapshot_format::{
    BuildId, BuildStore, DiskStorage, FormatError, PageCount, PageIndex, PageSize, PublishInfo,
    Storage, file_name,
};

/// Pages that one generation of a chain changes, in ascending order: first page and number.
pub(crate) type Generation = Vec<(u64, u64)>;

/// A store at `root` that keeps the length of page data but not its bytes, and syncs nothing.
///
/// # Errors
/// The directory can't be made.
pub(crate) fn store(root: &Path) -> Result<BuildStore, FormatError> {
    BuildStore::with_storage(root, Arc::new(Hollow))
}

/// The id of a generation's build.
pub(crate) fn id(generation: usize) -> BuildId {
    BuildId::from_bytes((generation as u128 + 1).to_le_bytes())
}

/// Publishes one build per generation, each over the one before; `progress` hears of each.
///
/// # Errors
/// Those of the writer.
pub(crate) fn write_chain(
    store: &BuildStore,
    memory_pages: u64,
    generations: &[Generation],
    progress: &mut dyn FnMut(usize),
) -> Result<(), FormatError> {
    let mut parent = None;
    for (generation, changes) in generations.iter().enumerate() {
        let id = id(generation);
        let mut staging = store.stage(id)?;
        let pages = PageCount::new(memory_pages);
        let mut writer = staging.memory_writer(parent.as_ref(), PageSize::Size4K, pages)?;
        for (start, pages) in changes {
            let content = vec![1; usize::try_from(pages * 4096).expect("runs are short")];
            writer.pages(PageIndex::new(*start), &content)?;
        }
        writer.finish()?;
        let vmstate = staging.file_path(file_name::VMSTATE);
        std::fs::write(&vmstate, b"no VMM").map_err(|source| FormatError::Io {
            operation: "Writing",
            path: vmstate,
            source,
        })?;
        staging.add_file(file_name::VMSTATE)?;
        staging.publish(PublishInfo::default())?;
        parent = Some(store.open(&id)?);
        progress(generation);
    }
    Ok(())
}

#[derive(Debug)]
struct Hollow;

impl Storage for Hollow {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        DiskStorage.create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        DiskStorage.create_file(path)
    }

    fn write_at(&self, file: &File, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if path.ends_with(file_name::DATA) {
            return file.set_len(offset + bytes.len() as u64);
        }
        DiskStorage.write_at(file, path, offset, bytes)
    }

    fn sync_file(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        DiskStorage.rename(from, to)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        DiskStorage.remove_dir_all(path)
    }
}
