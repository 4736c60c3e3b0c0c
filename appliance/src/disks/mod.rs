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
pub mod cow;
mod error;
pub mod files;
mod left_over;
mod snapshots;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use snapshot_format::FileEntry;
use snapshot_format::file_name::{ROOTFS, ROOTFS_BASE, ROOTFS_COW};

pub use error::DiskError;

use crate::config::{DiskBackend, DisksConfig};
use bases::Bases;
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

/// How much of the host a disk takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// What the guest sees.
    pub size_bytes: u64,
    /// What is stored for this disk; with reflinks, shared blocks count, too.
    pub stored_bytes: u64,
    /// How much that may get; without a bound of its own when absent.
    pub limit_bytes: Option<u64>,
    /// A write of the guest has failed because of that bound.
    pub is_full: bool,
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

/// How much the disk in a directory takes: of a sandbox, or of a build.
///
/// # Errors
/// There is none.
pub fn usage_of(dir: &Path) -> Result<Usage, DiskError> {
    let look = |name: &str| {
        let path = dir.join(name);
        fs::metadata(&path).map_err(DiskError::file("Looking at", path))
    };
    let (size, stored, limit_bytes) = match look(ROOTFS_COW) {
        Ok(changes) => (look(ROOTFS_BASE)?, changes.blocks(), Some(changes.len())),
        Err(_) => {
            let whole = look(ROOTFS)?;
            let blocks = whole.blocks();
            (whole, blocks, None)
        }
    };
    Ok(Usage {
        size_bytes: size.len(),
        stored_bytes: stored * 512,
        limit_bytes,
        is_full: false,
    })
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

fn choose(
    wanted: DiskBackend,
    instance: &str,
    data_dir: &Path,
) -> Result<(Backend, String), DiskError> {
    let refused =
        |backend: &'static str| move |reason: String| DiskError::Backend { backend, reason };
    let mapper = || try_device_mapper(instance, data_dir);
    let by_configuration = |way: &str| format!("{way}: disks.backend says so");
    match wanted {
        DiskBackend::Copy => Ok((Backend::Copy, by_configuration("copy"))),
        DiskBackend::Reflink => {
            try_reflink(data_dir)?.map_err(refused("reflink"))?;
            Ok((Backend::Reflink, by_configuration("reflink")))
        }
        DiskBackend::DeviceMapper => {
            let snapshots = mapper().map_err(refused("device-mapper"))?;
            let reason = by_configuration("device-mapper");
            Ok((Backend::DeviceMapper(snapshots), reason))
        }
        DiskBackend::Auto => {
            let no_mapper = match mapper() {
                Ok(snapshots) => {
                    let reason = "device-mapper: a snapshot in the data directory works";
                    return Ok((Backend::DeviceMapper(snapshots), reason.into()));
                }
                Err(reason) => reason,
            };
            Ok(match try_reflink(data_dir)? {
                Ok(()) => (
                    Backend::Reflink,
                    format!(
                        "reflink: the data directory's file system shares blocks; no device-mapper ({no_mapper})"
                    ),
                ),
                Err(no_reflink) => (
                    Backend::Copy,
                    format!("copy: no device-mapper ({no_mapper}), no reflink ({no_reflink})"),
                ),
            })
        }
    }
}

/// Tries a reflink in the data directory; the inner error says why it can't be.
fn try_reflink(data_dir: &Path) -> Result<Result<(), String>, DiskError> {
    let [from, to] = [".probe-from", ".probe-to"].map(|name| data_dir.join(name));
    fs::write(&from, [1u8; 4096]).map_err(DiskError::file("Writing", &from))?;
    let tried = files::reflink(&from, &to).map_err(|error| match error {
        DiskError::Copy { source, .. } => source.to_string(),
        error => error.to_string(),
    });
    let _ = fs::remove_file(&from);
    let _ = fs::remove_file(&to);
    Ok(tried)
}

/// Puts a small disk together, writes to it, and takes it apart again.
fn try_device_mapper(instance: &str, data_dir: &Path) -> Result<Snapshots, String> {
    const BYTES: u64 = 1 << 20;
    const NAME: &str = ".probe";
    let snapshots = Snapshots::open(instance).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "no /dev/mapper/control; load dm_mod".to_owned(),
        _ => format!("/dev/mapper/control: {error}"),
    })?;
    let [base, changes] = [".probe-base", ".probe-cow"].map(|name| data_dir.join(name));
    let tried = || -> Result<(), DiskError> {
        // Of a daemon that ended right here.
        let _ = snapshots.clear(NAME, data_dir);
        let _ = fs::remove_file(&changes);
        File::create(&base)
            .and_then(|file| file.set_len(BYTES))
            .map_err(DiskError::file("Making", &base))?;
        snapshots::declare(&changes, cow::bytes_for(BYTES))?;
        let attached = snapshots.attach(NAME, &base, &changes)?;
        let written = File::options()
            .write(true)
            .open(attached.node())
            .and_then(|node| {
                node.write_all_at(&[1; 4096], 0)
                    .and_then(|()| node.sync_all())
            })
            .map_err(DiskError::file("Writing to", attached.node()));
        snapshots.detach(&attached)?;
        written
    };
    let tried = tried().map_err(|error| uffd_engine::chain(&error));
    let _ = fs::remove_file(&base);
    let _ = fs::remove_file(&changes);
    tried.map(|()| snapshots)
}
