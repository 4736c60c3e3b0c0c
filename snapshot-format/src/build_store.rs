//! The `builds/` directory: published builds, and what is on its way in or out.
//!
//! ```text
//!  builds/.staging-<id>/  ──publish (rename)──▶  builds/<id>/  ──remove (rename)──▶  builds/.trash-<id>/
//! ```
//!
//! A name that is a build id is a whole build, always. Names with a dot in front are unfinished
//! business of a process; [`BuildStore::remove_staging`] clears them when no such process is
//! left. A staging directory with a `.merge-<id>/` beside it is an unfinished merge, and stays.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::build::Build;
use crate::build_id::BuildId;
use crate::error::FormatError;
use crate::staging::Staging;
use crate::storage::{DiskStorage, Storage};

const STAGING_PREFIX: &str = ".staging-";
const TRASH_PREFIX: &str = ".trash-";
const MERGE_PREFIX: &str = ".merge-";
const WORKING_SET_PREFIX: &str = ".working-set-";

/// A directory of builds. Clones share the storage.
#[derive(Clone, Debug)]
pub struct BuildStore {
    root: PathBuf,
    storage: Arc<dyn Storage>,
}

impl BuildStore {
    /// Opens the directory, creating it and its parents if need be.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn open_or_create(root: &Path) -> Result<Self, FormatError> {
        Self::with_storage(root, Arc::new(DiskStorage))
    }

    /// As [`BuildStore::open_or_create`], with another way to write.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn with_storage(root: &Path, storage: Arc<dyn Storage>) -> Result<Self, FormatError> {
        let missing: Vec<_> = root.ancestors().take_while(|dir| !dir.exists()).collect();
        fs::create_dir_all(root).map_err(FormatError::io("Creating", root))?;
        // A durable build in a directory that vanishes would not be worth much.
        for parent in missing.iter().filter_map(|dir| dir.parent()) {
            let parent = if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            };
            storage
                .sync_dir(parent)
                .map_err(FormatError::io("Syncing", parent))?;
        }
        let root = root.to_owned();
        Ok(Self { root, storage })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a build is, if it is published.
    pub fn path(&self, id: &BuildId) -> PathBuf {
        self.root.join(id.to_string())
    }

    /// Whether a build is published.
    pub fn contains(&self, id: &BuildId) -> bool {
        self.path(id).is_dir()
    }

    /// All published builds, in the order of their ids.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn list(&self) -> Result<Vec<BuildId>, FormatError> {
        let mut ids: Vec<_> = self
            .names()?
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// Opens a build and checks that all data it refers to is there.
    ///
    /// # Errors
    /// [`FormatError::NotFound`], [`FormatError::AncestorMissing`],
    /// [`FormatError::AncestorChanged`], [`FormatError::Cold`] if any of it is encoded,
    /// [`FormatError::Corrupt`], [`FormatError::Unsupported`] or [`FormatError::Io`].
    pub fn open(&self, id: &BuildId) -> Result<Build, FormatError> {
        Build::open_served(&self.root, *id)
    }

    /// As [`BuildStore::open`], for those who read pages through [`Build`] only, which decodes
    /// what is encoded.
    ///
    /// # Errors
    /// As for [`BuildStore::open`], without [`FormatError::Cold`].
    pub fn open_cold(&self, id: &BuildId) -> Result<Build, FormatError> {
        Build::open(&self.root, *id)
    }

    /// Begins a new build.
    ///
    /// # Errors
    /// [`FormatError::AlreadyExists`] if the id is published or being staged,
    /// [`FormatError::NilBuildId`] or [`FormatError::Io`].
    pub fn stage(&self, id: BuildId) -> Result<Staging, FormatError> {
        if id.is_nil() {
            return Err(FormatError::NilBuildId);
        }
        let path = self.path(&id);
        if path.exists() {
            return Err(FormatError::AlreadyExists { build_id: id, path });
        }
        let dir = self.staging_dir(&id);
        match self.storage.create_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(FormatError::AlreadyExists {
                    build_id: id,
                    path: dir,
                });
            }
            created => created.map_err(FormatError::io("Creating", &dir))?,
        }
        Ok(Staging::new(self.clone(), id, dir))
    }

    /// Removes a build. Who still has it open keeps its files until they are closed.
    ///
    /// The caller knows that no other build refers to it: the store doesn't count references.
    ///
    /// # Errors
    /// [`FormatError::NotFound`] or [`FormatError::Io`].
    pub fn remove(&self, id: &BuildId) -> Result<(), FormatError> {
        let path = self.path(id);
        if !path.is_dir() {
            return Err(FormatError::NotFound { build_id: *id });
        }
        // The name is given up first, so that a crash can't leave half a build under it.
        let trash = self.root.join(format!("{TRASH_PREFIX}{id}"));
        if trash.exists() {
            self.remove_dir(&trash)?;
        }
        self.storage
            .rename(&path, &trash)
            .map_err(FormatError::io("Renaming", &path))?;
        self.sync_root()?;
        self.remove_dir(&trash)?;
        self.sync_root()
    }

    /// The staging and trash directories that are there, and the journals of merges that were
    /// published.
    ///
    /// An unfinished merge is none of them: it goes on when it is asked for again
    /// ([`BuildStore::unfinished_merges`]).
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn leftovers(&self) -> Result<Vec<PathBuf>, FormatError> {
        let unfinished = |name: &String| {
            let id = |prefix| name.strip_prefix(prefix)?.parse::<BuildId>().ok();
            id(TRASH_PREFIX).is_some()
                || id(STAGING_PREFIX).is_some_and(|id| !self.merge_dir(&id).is_dir())
                || id(MERGE_PREFIX).is_some_and(|id| self.contains(&id))
        };
        let names = self.names()?;
        Ok(names
            .iter()
            .filter(|name| unfinished(name))
            .map(|name| self.root.join(name))
            .collect())
    }

    /// The builds into which something is being merged.
    pub(crate) fn merge_ids(&self) -> Result<Vec<BuildId>, FormatError> {
        let id = |name: &String| name.strip_prefix(MERGE_PREFIX)?.parse().ok();
        Ok(self.names()?.iter().filter_map(id).collect())
    }

    pub(crate) fn staging_dir(&self, id: &BuildId) -> PathBuf {
        self.root.join(format!("{STAGING_PREFIX}{id}"))
    }

    /// Where a working set is written before it is renamed into its build.
    pub(crate) fn working_set_temporary(&self, id: &BuildId) -> PathBuf {
        self.root.join(format!("{WORKING_SET_PREFIX}{id}"))
    }

    pub(crate) fn merge_dir(&self, id: &BuildId) -> PathBuf {
        self.root.join(format!("{MERGE_PREFIX}{id}"))
    }

    /// Removes what crashes left behind, and returns what that was.
    ///
    /// To be called while nobody stages into or removes from this store: at start.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn remove_staging(&self) -> Result<Vec<PathBuf>, FormatError> {
        let leftovers = self.leftovers()?;
        for dir in &leftovers {
            self.remove_dir(dir)?;
        }
        if !leftovers.is_empty() {
            self.sync_root()?;
        }
        self.remove_unfinished_working_sets()?;
        Ok(leftovers)
    }

    /// They are advice: that one is lost, or comes back after a crash of the host, does no harm.
    fn remove_unfinished_working_sets(&self) -> Result<(), FormatError> {
        let listing = || FormatError::io("Listing", &self.root);
        for entry in fs::read_dir(&self.root).map_err(listing())? {
            let entry = entry.map_err(listing())?;
            let name = entry.file_name();
            let id = name
                .to_str()
                .and_then(|name| name.strip_prefix(WORKING_SET_PREFIX));
            if id.is_some_and(|id| id.parse::<BuildId>().is_ok()) {
                let path = entry.path();
                fs::remove_file(&path).map_err(FormatError::io("Removing", &path))?;
            }
        }
        Ok(())
    }

    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    pub(crate) fn sync_root(&self) -> Result<(), FormatError> {
        self.storage
            .sync_dir(&self.root)
            .map_err(FormatError::io("Syncing", &self.root))
    }

    pub(crate) fn remove_dir(&self, dir: &Path) -> Result<(), FormatError> {
        self.storage
            .remove_dir_all(dir)
            .map_err(FormatError::io("Removing", dir))
    }

    /// The names of the directories in the store.
    fn names(&self) -> Result<Vec<String>, FormatError> {
        let read = || {
            let mut names = Vec::new();
            for entry in fs::read_dir(&self.root)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    names.extend(entry.file_name().into_string().ok());
                }
            }
            Ok(names)
        };
        read().map_err(FormatError::io("Listing", &self.root))
    }
}
