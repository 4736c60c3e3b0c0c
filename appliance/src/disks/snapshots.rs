//! Disks by device-mapper: what a guest writes goes to a file of its own, the rest is read from
//! an image that all its siblings share.
//!
//! ```text
//!   /dev/dm-3 ─ snapshot ─┬─ /dev/loop0, read-only ── base     (one per image, counted)
//!                         └─ /dev/loop7 ───────────── rootfs.cow  (sparse, with a declared size)
//! ```
//!
//! Neither device goes by itself when this daemon ends: a guest may still run. What is left of them
//! is removed by [`left_over`](super::left_over).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::cow::{self, CHUNK_SECTORS};
use super::error::DiskError;
use crate::sys::device_mapper::{DeviceMapper, Target};
use crate::sys::loop_device::LoopDevice;

const SECTOR_BYTES: u64 = 512;
/// How long a device may stay open after the VMM that used it has ended.
const LET_GO: Duration = Duration::from_secs(5);

/// Device and inode of a base's file: the same for all of its names.
type BaseId = (u64, u64);

/// A base's device and how many disks are over it.
#[derive(Debug)]
struct Base {
    device: LoopDevice,
    users: usize,
}

/// The way to make such disks.
#[derive(Debug)]
pub(super) struct Snapshots {
    pub(super) mapper: DeviceMapper,
    pub(super) instance: String,
    bases: Mutex<BTreeMap<BaseId, Base>>,
}

/// A disk that is a block device now.
#[derive(Debug)]
pub(super) struct Attached {
    id: String,
    node: PathBuf,
    base: BaseId,
    cow: LoopDevice,
}

/// How much of its file a disk has filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filled {
    /// Bytes in use, with the metadata.
    pub(super) bytes: u64,
    /// Bytes there are.
    pub(super) limit_bytes: u64,
    /// A write has failed because of that.
    pub(super) is_full: bool,
}

impl Snapshots {
    pub(super) fn open(instance: &str) -> io::Result<Self> {
        Ok(Self {
            mapper: DeviceMapper::open()?,
            instance: instance.to_owned(),
            bases: Mutex::default(),
        })
    }

    /// Puts a disk together from a base, which is only read, and its changes: a file that may be
    /// empty, new, or what was left of an earlier time.
    ///
    /// # Errors
    /// Which step failed; nothing is left but the files.
    pub(super) fn attach(
        &self,
        id: &str,
        base: &Path,
        changes: &Path,
    ) -> Result<Attached, DiskError> {
        let sectors = sectors_of(base)?;
        let (base, base_device) = self.acquire_base(base)?;
        let cow = File::options()
            .read(true)
            .write(true)
            .open(changes)
            .and_then(|file| LoopDevice::attach(&file, false));
        let attached = cow
            .map_err(device(id, "attaching a loop device to its changes"))
            .and_then(|cow| {
                let table = format!(
                    "{} {} PO {CHUNK_SECTORS}",
                    base_device.numbers(),
                    cow.numbers()
                );
                let node = self.set_up(id, sectors, &table).inspect_err(|_| {
                    if let Err(error) = cow.release() {
                        tracing::warn!(sandbox_id = id, %error, "A loop device is left over");
                    }
                })?;
                Ok(Attached {
                    id: id.to_owned(),
                    node,
                    base,
                    cow,
                })
            });
        attached.inspect_err(|_| self.release_base(base))
    }

    /// Takes over a disk that an earlier daemon put together over this base.
    ///
    /// # Errors
    /// There is none of this sandbox, or it is made of something else.
    pub(super) fn adopt(&self, id: &str, base: &Path) -> Result<Attached, DiskError> {
        let of = |step: &'static str| device(id, step);
        let (node, table) = self
            .mapper
            .table(&name_of(&self.instance, id))
            .map_err(of("finding its device"))?;
        let [base_device, cow] = loops_of(&table).ok_or_else(|| {
            let source = io::Error::new(io::ErrorKind::InvalidData, table);
            of("understanding its table")(source)
        })?;
        let m = fs::metadata(base).map_err(DiskError::file("Looking at", base))?;
        let base = (m.dev(), m.ino());
        let mut bases = self.bases.lock();
        let found = bases.entry(base).or_insert(Base {
            device: base_device,
            users: 0,
        });
        found.users += 1;
        Ok(Attached {
            id: id.to_owned(),
            node,
            base,
            cow,
        })
    }

    fn set_up(&self, id: &str, sectors: u64, table: &str) -> Result<PathBuf, DiskError> {
        let name = name_of(&self.instance, id);
        let node = self
            .mapper
            .create(&name)
            .map_err(device(id, "making its device"))?;
        let target = Target {
            sectors,
            kind: "snapshot",
            parameters: table,
        };
        let made = self
            .mapper
            .load(&name, &target)
            .map_err(device(
                id,
                "loading its table; is dm-snapshot in this kernel?",
            ))
            .and_then(|()| {
                self.mapper
                    .resume(&name)
                    .map_err(device(id, "starting its device"))
            });
        match made {
            Ok(()) => Ok(node),
            Err(error) => {
                if let Err(error) = self.mapper.remove(&name) {
                    tracing::warn!(sandbox_id = id, %error, "A device is left over");
                }
                Err(error)
            }
        }
    }

    /// Takes a disk apart; its files stay. Waits a while for whoever still has it open.
    ///
    /// # Errors
    /// Which step failed; what is left is found at the next start.
    pub(super) fn detach(&self, attached: &Attached) -> Result<(), DiskError> {
        let id = &attached.id;
        remove(&self.mapper, &name_of(&self.instance, id))
            .map_err(device(id, "removing its device"))?;
        attached
            .cow
            .release()
            .map_err(device(id, "releasing the loop device of its changes"))?;
        self.release_base(attached.base);
        Ok(())
    }

    /// What the guest has written is in the file afterwards, and stays there.
    pub(super) fn flush(&self, attached: &Attached) -> Result<(), DiskError> {
        File::open(&attached.node)
            .and_then(|node| node.sync_all())
            .map_err(device(&attached.id, "writing back what is in memory of it"))
    }

    /// How full its file is.
    pub(super) fn filled(&self, attached: &Attached) -> Result<Filled, DiskError> {
        let status = self
            .mapper
            .status(&name_of(&self.instance, &attached.id))
            .map_err(device(&attached.id, "asking for its status"))?;
        parse_status(&status).ok_or_else(|| {
            let source = io::Error::new(io::ErrorKind::InvalidData, status);
            device(&attached.id, "understanding its status")(source)
        })
    }

    fn acquire_base(&self, base: &Path) -> Result<(BaseId, LoopDevice), DiskError> {
        let failed = || DiskError::file("Attaching a loop device to", base);
        let file = File::open(base).map_err(failed())?;
        let m = file.metadata().map_err(failed())?;
        let id = (m.dev(), m.ino());
        let mut bases = self.bases.lock();
        if let Some(base) = bases.get_mut(&id) {
            base.users += 1;
            return Ok((id, base.device));
        }
        let device = LoopDevice::attach(&file, true).map_err(failed())?;
        if !device.is_direct() {
            tracing::info!(
                base = %base.display(),
                "Its file system has no direct I/O, so the page cache holds it, too"
            );
        }
        bases.insert(id, Base { device, users: 1 });
        Ok((id, device))
    }

    /// Carries something out with the loop devices of all bases that disks are over; none is added or
    /// released meanwhile.
    pub(super) fn with_bases<T>(&self, act: impl FnOnce(&[LoopDevice]) -> T) -> T {
        let bases = self.bases.lock();
        let devices: Vec<_> = bases.values().map(|base| base.device).collect();
        act(&devices)
    }

    fn release_base(&self, id: BaseId) {
        let mut bases = self.bases.lock();
        let Some(base) = bases.get_mut(&id) else {
            return;
        };
        base.users -= 1;
        if base.users > 0 {
            return;
        }
        if let Err(error) = base.device.release() {
            tracing::warn!(device = %base.device.path().display(), %error, "A loop device is left over");
        }
        bases.remove(&id);
    }
}

impl Attached {
    /// What a VMM opens.
    pub(super) fn node(&self) -> &Path {
        &self.node
    }
}

/// Makes the file of a disk's changes as long as it should be, and no shorter than it is.
///
/// # Errors
/// It can't be written.
pub(super) fn declare(changes: &Path, bytes: u64) -> Result<(), DiskError> {
    let grown = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(changes)
        .and_then(|file| {
            let now = file.metadata()?.len();
            file.set_len(now.max(bytes))
        });
    grown.map_err(DiskError::file("Making", changes))
}

/// The loop devices in the table of a disk: its base's and its changes'.
pub(super) fn loops_of(table: &str) -> Option<[LoopDevice; 2]> {
    let mut numbers = table.split_whitespace().map(LoopDevice::of_numbers);
    Some([numbers.next()??, numbers.next()??])
}

pub(super) fn remove(mapper: &DeviceMapper, name: &str) -> io::Result<()> {
    let started = Instant::now();
    loop {
        match mapper.remove(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY) && started.elapsed() < LET_GO =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// An instance's name has only letters, so no name of one begins like those of another.
pub(super) fn name_of(instance: &str, id: &str) -> String {
    format!("thaw-{instance}-{id}")
}

fn sectors_of(base: &Path) -> Result<u64, DiskError> {
    let bytes = fs::metadata(base)
        .map_err(DiskError::file("Looking at", base))?
        .len();
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(DiskError::Image {
            path: base.to_owned(),
            problem: format!("has {bytes} bytes; a disk has a multiple of {SECTOR_BYTES}"),
        });
    }
    Ok(bytes / SECTOR_BYTES)
}

/// `<used>/<all sectors> <metadata sectors>`, `Overflow` or `Invalid`.
/// Source: Linux `Documentation/admin-guide/device-mapper/snapshot.rst`.
fn parse_status(status: &str) -> Option<Filled> {
    let full = Filled {
        bytes: 0,
        limit_bytes: 0,
        is_full: true,
    };
    if status == "Overflow" || status == "Invalid" {
        return Some(full);
    }
    let (used, all) = status.split_whitespace().next()?.split_once('/')?;
    Some(Filled {
        bytes: used.parse::<u64>().ok()? * SECTOR_BYTES,
        limit_bytes: all.parse::<u64>().ok()? * SECTOR_BYTES,
        is_full: false,
    })
}

pub(super) fn device(name: &str, step: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    let name = name.to_owned();
    move |source| DiskError::Device { name, step, source }
}

/// The length of the file for the changes of a disk: as much as it could need, or as declared.
pub(super) fn declared_bytes(base: &Path, cow_bytes: Option<u64>) -> Result<u64, DiskError> {
    let most = cow::bytes_for(sectors_of(base)? * SECTOR_BYTES);
    Ok(cow_bytes.map_or(most, |declared| declared.min(most)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loop_devices_of_a_table_are_found() {
        let found = loops_of("7:3 7:14 PO 16").unwrap();
        assert_eq!(found.map(LoopDevice::numbers), ["7:3", "7:14"]);
        for other in ["", "7:3", "7:3 8:1 PO 16", "0 7:1", "7:x 7:1"] {
            assert_eq!(loops_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_status_says_how_full_the_file_is() {
        let filled = parse_status("48/2048 16").unwrap();
        assert_eq!((filled.bytes, filled.limit_bytes), (48 * 512, 1 << 20));
        assert!(!filled.is_full);
        assert!(parse_status("Overflow").unwrap().is_full);
        assert!(parse_status("Invalid").unwrap().is_full);
        assert_eq!(parse_status("Merge failed"), None);
    }

    #[test]
    fn no_instances_names_begin_like_anothers() {
        assert!(!name_of("ab", "c").starts_with(&name_of("a", "")));
    }

    #[test]
    fn a_file_for_changes_only_grows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cow");
        declare(&path, 5000).unwrap();
        declare(&path, 4000).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 5000);
        declare(&path, 9000).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 9000);
    }

    #[test]
    fn an_image_of_odd_length_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1000).unwrap();
        let error = sectors_of(file.path()).unwrap_err().to_string();
        assert!(error.contains("1000") && error.contains("512"), "{error}");
    }
}
