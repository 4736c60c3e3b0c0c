//! Sandboxes' disks, by one of three ways that is chosen once, at start, by trying.
//!
//! ```text
//!               a new disk                       in a build of a pause     in a template's build
//!  device-mapper  snapshot over a shared image    rootfs.base + rootfs.cow  rootfs.img, flattened
//!  reflink        file that shares its blocks     rootfs.img, the same file rootfs.img, shared blocks
//!  copy           file, holes stay holes          rootfs.img, the same file rootfs.img, a copy
//! ```
//!
//! A disk of any build can be gone on with by any way, so the choice may change between two starts.
//! `rootfs.base` is another name of the image that the disk was made over: it costs nothing, and the
//! image lives as long as anything needs it.
//!
//! Everything here blocks: call it off a shard's thread.

mod bases;
mod choice;
pub mod cow;
mod error;
pub mod files;
mod left_over;
mod snapshots;
mod usage;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use snapshot_format::FileEntry;
use snapshot_format::file_name::{ROOTFS, ROOTFS_BASE, ROOTFS_COW};

pub use error::DiskError;
pub use usage::{Usage, usage_of};

use crate::config::DisksConfig;
use bases::Bases;
use choice::choose;
use snapshots::{Attached, Snapshots};

/// What a new disk begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A template's image.
    Image {
        /// The file.
        path: PathBuf,
        /// MiB that the disk shall have, its file system grown; the image's own when absent.
        size_mb: Option<u64>,
    },
    /// The disk in a build.
    Build(PathBuf),
}

/// A file of a build that a disk was put into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its name.
    pub name: &'static str,
    /// Others have the same file, which nobody writes: its checksum may be known.
    pub is_shared: bool,
}

/// The disks of this host.
#[derive(Clone, Debug)]
pub struct Disks {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    backend: Backend,
    reason: String,
    cow_bytes: Option<u64>,
    bases: Bases,
    /// Length and checksum of bases that are in builds, by identity.
    entries: Mutex<BTreeMap<String, FileEntry>>,
    /// Of sandboxes that have a VMM, or soon will.
    taken: Mutex<BTreeMap<String, Disk>>,
}

#[derive(Debug)]
enum Backend {
    DeviceMapper(Snapshots),
    Reflink,
    Copy,
}

#[derive(Debug)]
struct Disk {
    dir: PathBuf,
    /// `None`: the disk is a file.
    attached: Option<Arc<Attached>>,
}

impl Disk {
    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Disks {
    /// Chooses a way. `images` are those of the configuration's templates.
    ///
    /// # Errors
    /// The data directory can't be written, or the configured way can't be gone here.
    pub fn start(
        config: &DisksConfig,
        instance: &str,
        data_dir: &Path,
        images: &[PathBuf],
    ) -> Result<Self, DiskError> {
        let (backend, reason) = choose(config.backend, instance, data_dir)?;
        Ok(Self {
            inner: Arc::new(Inner {
                backend,
                reason,
                cow_bytes: config.cow_mb.map(|mb| mb << 20),
                bases: Bases::open(data_dir.join("bases"), images)?,
                entries: Mutex::default(),
                taken: Mutex::default(),
            }),
        })
    }

    /// `device-mapper`, `reflink` or `copy`.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        match self.inner.backend {
            Backend::DeviceMapper(_) => "device-mapper",
            Backend::Reflink => "reflink",
            Backend::Copy => "copy",
        }
    }

    /// The way, and why.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.inner.reason
    }

    /// Makes a sandbox's disk, with its files in `dir`; gives what a VMM opens. It is the
    /// sandbox's until [`Disks::remove`].
    ///
    /// # Errors
    /// What failed; at most files in `dir` are left.
    pub fn make(&self, id: &str, source: &Source, dir: &Path) -> Result<PathBuf, DiskError> {
        let disk = match &self.inner.backend {
            Backend::DeviceMapper(snapshots) => self.make_snapshot(snapshots, id, source, dir)?,
            Backend::Reflink | Backend::Copy => {
                self.make_file(source, &dir.join(ROOTFS))?;
                Disk {
                    dir: dir.to_owned(),
                    attached: None,
                }
            }
        };
        let opened = match &disk.attached {
            Some(attached) => attached.node().to_owned(),
            None => disk.file(ROOTFS),
        };
        self.inner.taken.lock().insert(id.to_owned(), disk);
        Ok(opened)
    }

    /// Takes over a sandbox's disk that an earlier daemon made, with its files in `dir`: it is the
    /// sandbox's again, and what a VMM has opened is given.
    ///
    /// # Errors
    /// There is none, or today's way has nothing to do with it.
    pub fn adopt(&self, id: &str, dir: &Path) -> Result<PathBuf, DiskError> {
        let attached = match &self.inner.backend {
            Backend::DeviceMapper(snapshots) if dir.join(ROOTFS_COW).exists() => {
                Some(snapshots.adopt(id, &dir.join(ROOTFS_BASE))?)
            }
            _ => None,
        };
        let file = dir.join(ROOTFS);
        if attached.is_none() {
            fs::metadata(&file).map_err(DiskError::file("Taking over", &file))?;
        }
        let opened = attached.as_ref().map_or(file, |it| it.node().to_owned());
        let disk = Disk {
            dir: dir.to_owned(),
            attached: attached.map(Arc::new),
        };
        self.inner.taken.lock().insert(id.to_owned(), disk);
        Ok(opened)
    }

    fn make_snapshot(
        &self,
        snapshots: &Snapshots,
        id: &str,
        source: &Source,
        dir: &Path,
    ) -> Result<Disk, DiskError> {
        let (base, changes) = (dir.join(ROOTFS_BASE), dir.join(ROOTFS_COW));
        match source {
            Source::Image { path, size_mb } => {
                files::link(&self.inner.bases.get(path, *size_mb)?, &base)?;
            }
            Source::Build(build) if build.join(ROOTFS_COW).exists() => {
                files::link(&build.join(ROOTFS_BASE), &base)?;
                files::cheapest_copy(&build.join(ROOTFS_COW), &changes)?;
            }
            Source::Build(build) => files::link(&build.join(ROOTFS), &base)?,
        }
        let bytes = snapshots::declared_bytes(&base, self.inner.cow_bytes)?;
        snapshots::declare(&changes, bytes)?;
        let attached = match snapshots.attach(id, &base, &changes) {
            // Left of an earlier time, when somebody had it open for too long.
            Err(error) if error.is_there_already() && !self.inner.taken.lock().contains_key(id) => {
                tracing::warn!(
                    sandbox_id = id,
                    "Taking its last disk apart, which was left over"
                );
                snapshots.clear(id, dir.parent().unwrap_or(dir))?;
                snapshots.attach(id, &base, &changes)?
            }
            attached => attached?,
        };
        Ok(Disk {
            dir: dir.to_owned(),
            attached: Some(Arc::new(attached)),
        })
    }

    fn make_file(&self, source: &Source, target: &Path) -> Result<(), DiskError> {
        match source {
            Source::Image {
                path,
                size_mb: None,
            } => self.copy(path, target),
            Source::Image { path, size_mb } => {
                self.copy(&self.inner.bases.get(path, *size_mb)?, target)
            }
            Source::Build(build) if build.join(ROOTFS_COW).exists() => {
                let (base, changes) = (build.join(ROOTFS_BASE), build.join(ROOTFS_COW));
                files::flatten(&base, &changes, target).map(|_| ())
            }
            Source::Build(build) => self.copy(&build.join(ROOTFS), target),
        }
    }

    fn copy(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        match self.inner.backend {
            Backend::Reflink => files::cheapest_copy(from, to),
            Backend::DeviceMapper(_) | Backend::Copy => files::sparse_copy(from, to),
        }
    }

    /// Lets go of a sandbox's disk, whose VMM has ended; its files are the caller's to remove.
    /// That it has none is no error.
    pub fn remove(&self, id: &str) {
        let disk = self.inner.taken.lock().remove(id);
        let attached = disk.and_then(|disk| disk.attached);
        if let (Some(attached), Backend::DeviceMapper(snapshots)) = (attached, &self.inner.backend)
            && let Err(error) = snapshots.detach(&attached)
        {
            let error = uffd_engine::chain(&error);
            tracing::warn!(sandbox_id = id, error, "Its disk is left over");
        }
    }

    /// Sandboxes of whose disks there is anything in the kernel: those of now, and what is left of
    /// others. `sandboxes` is where their files are.
    ///
    /// # Errors
    /// The kernel doesn't say.
    pub fn owners(&self, sandboxes: &Path) -> Result<BTreeSet<String>, DiskError> {
        match &self.inner.backend {
            Backend::DeviceMapper(snapshots) => snapshots.owners(sandboxes),
            Backend::Reflink | Backend::Copy => Ok(BTreeSet::new()),
        }
    }

    /// Takes apart what is left in the kernel of the disk of a sandbox that there isn't.
    ///
    /// # Errors
    /// Somebody has it open, or the kernel refuses.
    pub fn clear(&self, id: &str, sandboxes: &Path) -> Result<(), DiskError> {
        match &self.inner.backend {
            Backend::DeviceMapper(snapshots) => snapshots.clear(id, sandboxes),
            Backend::Reflink | Backend::Copy => Ok(()),
        }
    }

    /// Puts the disk of a stopped guest into a build's directory, without a copy. The guest may
    /// go on if nobody takes the build.
    ///
    /// # Errors
    /// What failed; files may be in the directory.
    pub fn keep(&self, id: &str, build: &Path) -> Result<Vec<Kept>, DiskError> {
        let whole = |name| Kept {
            name,
            is_shared: false,
        };
        let (dir, attached) = self.find(id)?;
        let Some(attached) = attached else {
            files::link(&dir.join(ROOTFS), &build.join(ROOTFS))?;
            return Ok(vec![whole(ROOTFS)]);
        };
        if let Err(error) = self.check_room(id, &attached) {
            // What was written before is there, and so is the guest: better kept than lost.
            tracing::warn!(sandbox_id = id, %error, "Pausing it all the same");
        }
        self.flush(&attached)?;
        files::link(&dir.join(ROOTFS_COW), &build.join(ROOTFS_COW))?;
        files::link(&dir.join(ROOTFS_BASE), &build.join(ROOTFS_BASE))?;
        let base = Kept {
            name: ROOTFS_BASE,
            is_shared: true,
        };
        Ok(vec![whole(ROOTFS_COW), base])
    }

    /// Puts a standalone copy of the disk of a stopped guest into a build's directory.
    ///
    /// # Errors
    /// What failed, [`DiskError::Full`] if the guest's writes have: a template of that would be
    /// of no use. No copy is left.
    pub fn flatten(&self, id: &str, build: &Path) -> Result<Vec<Kept>, DiskError> {
        let (dir, attached) = self.find(id)?;
        let target = build.join(ROOTFS);
        match attached {
            None => self.copy(&dir.join(ROOTFS), &target)?,
            Some(attached) => {
                self.check_room(id, &attached)?;
                self.flush(&attached)?;
                files::flatten(&dir.join(ROOTFS_BASE), &dir.join(ROOTFS_COW), &target)?;
            }
        }
        Ok(vec![Kept {
            name: ROOTFS,
            is_shared: false,
        }])
    }

    /// What is remembered of a shared file.
    #[must_use]
    pub fn known_entry(&self, file: &Path) -> Option<FileEntry> {
        let identity = bases::identity(file).ok()?;
        self.inner.entries.lock().get(&identity).copied()
    }

    /// Remembers a shared file, so that it is read for its checksum once and not at every pause.
    pub fn remember_entry(&self, file: &Path, entry: FileEntry) {
        if let Ok(identity) = bases::identity(file) {
            self.inner.entries.lock().insert(identity, entry);
        }
    }

    /// How much a sandbox's disk takes now.
    ///
    /// # Errors
    /// It has none, or the host can't say.
    pub fn usage(&self, id: &str) -> Result<Usage, DiskError> {
        let (dir, attached) = self.find(id)?;
        let mut usage = usage_of(&dir)?;
        if let (Some(attached), Backend::DeviceMapper(snapshots)) = (attached, &self.inner.backend)
        {
            usage.is_full = snapshots.filled(&attached)?.is_full;
        }
        Ok(usage)
    }

    fn find(&self, id: &str) -> Result<(PathBuf, Option<Arc<Attached>>), DiskError> {
        let taken = self.inner.taken.lock();
        let found = taken
            .get(id)
            .map(|disk| (disk.dir.clone(), disk.attached.clone()));
        found.ok_or_else(|| DiskError::Device {
            name: id.to_owned(),
            step: "finding it",
            source: std::io::ErrorKind::NotFound.into(),
        })
    }

    fn flush(&self, attached: &Attached) -> Result<(), DiskError> {
        match &self.inner.backend {
            Backend::DeviceMapper(snapshots) => snapshots.flush(attached),
            Backend::Reflink | Backend::Copy => Ok(()),
        }
    }

    fn check_room(&self, id: &str, attached: &Attached) -> Result<(), DiskError> {
        let Backend::DeviceMapper(snapshots) = &self.inner.backend else {
            return Ok(());
        };
        if !snapshots.filled(attached)?.is_full {
            return Ok(());
        }
        let limit = self.usage(id)?.limit_bytes.unwrap_or_default();
        Err(DiskError::Full {
            name: id.to_owned(),
            limit_mb: limit >> 20,
        })
    }
}

/// Removes what earlier daemons of this instance have left in the kernel, whose VMMs have ended;
/// what belongs to sandboxes that are `kept` stays. Gives how much that was.
///
/// # Errors
/// What can't be removed.
pub fn remove_left_over(
    instance: &str,
    data_dir: &Path,
    kept: &BTreeSet<String>,
) -> Result<usize, DiskError> {
    left_over::remove_left_over(instance, data_dir, kept)
}
