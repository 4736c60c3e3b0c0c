//! What is left of disks by device-mapper: of an earlier daemon, or of a sandbox whose disk could not
//! be taken apart. Devices are found by their names, loop devices by where their files are.

use std::collections::BTreeSet;
use std::path::Path;

use super::error::DiskError;
use super::snapshots::{Snapshots, device, loops_of, name_of, remove};
use crate::sys::device_mapper::DeviceMapper;
use crate::sys::loop_device::{self, LoopDevice};

/// What an instance has left behind: devices by their name, loop devices by where their files
/// are; but for those of sandboxes that are `kept`. Gives how many of both were removed.
///
/// # Errors
/// Which step failed.
pub(super) fn remove_left_over(
    instance: &str,
    dir: &Path,
    kept: &BTreeSet<String>,
) -> Result<usize, DiskError> {
    let failed = |step| device(instance, step);
    let (mut removed, mut in_use) = (0, Vec::new());
    // Without device-mapper nothing can be left of it.
    if let Ok(mapper) = DeviceMapper::open() {
        let prefix = name_of(instance, "");
        let names = mapper.names().map_err(failed("listing devices"))?;
        let ours = names
            .iter()
            .filter_map(|name| Some((name, name.strip_prefix(&prefix)?)));
        for (name, id) in ours {
            if kept.contains(id) {
                let (_, table) = mapper.table(name).map_err(failed("reading a table"))?;
                in_use.extend(loops_of(&table).into_iter().flatten());
                continue;
            }
            remove(&mapper, name).map_err(failed("removing a device that was left over"))?;
            removed += 1;
        }
    }
    let all = loop_device::below(dir).map_err(failed("listing loop devices"))?;
    for device in all.into_iter().filter(|device| !in_use.contains(device)) {
        device
            .release()
            .map_err(failed("releasing a loop device that was left over"))?;
        removed += 1;
    }
    Ok(removed)
}

impl Snapshots {
    /// Whose disks are in the kernel, whole or in part; `sandboxes` is where their files are. Loop
    /// devices that a disk is made of are no part of another.
    ///
    /// # Errors
    /// The kernel doesn't say.
    pub(super) fn owners(&self, sandboxes: &Path) -> Result<BTreeSet<String>, DiskError> {
        let prefix = name_of(&self.instance, "");
        let names = self.names()?;
        let mapped = names.iter().filter_map(|name| name.strip_prefix(&prefix));
        let mut owners: BTreeSet<String> = mapped.map(str::to_owned).collect();
        let unused = self.with_bases(|bases| self.unused(sandboxes, bases))?;
        owners.extend(unused.into_iter().map(|(_, owner)| owner));
        Ok(owners)
    }

    /// Takes apart what there is of a disk that is nobody's; loop devices that others use stay.
    ///
    /// # Errors
    /// Which step failed: somebody has it open, for one.
    pub(super) fn clear(&self, id: &str, sandboxes: &Path) -> Result<(), DiskError> {
        let of = |step| device(id, step);
        let name = name_of(&self.instance, id);
        let table = self.mapper.table(&name).ok();
        remove(&self.mapper, &name).map_err(of("removing its device"))?;
        let under = table.and_then(|(_, table)| loops_of(&table));
        let is_its = |device: &LoopDevice, owner: &str| {
            owner == id || under.is_some_and(|under| under.contains(device))
        };
        self.with_bases(|bases| {
            let unused = self.unused(sandboxes, bases)?;
            let mut its = unused
                .into_iter()
                .filter(|(device, owner)| is_its(device, owner));
            its.try_for_each(|(loop_device, _)| loop_device.release())
                .map_err(of("releasing a loop device"))
        })
    }

    /// Loop devices over sandboxes' files that no disk is made of, and whose files those are.
    fn unused(
        &self,
        sandboxes: &Path,
        bases: &[LoopDevice],
    ) -> Result<Vec<(LoopDevice, String)>, DiskError> {
        let failed = |step| device(&self.instance, step);
        let sandboxes = sandboxes
            .canonicalize()
            .map_err(DiskError::file("Looking for", sandboxes))?;
        let mut used = bases.to_vec();
        for name in self.names()? {
            // It may be gone by now.
            if let Ok((_, table)) = self.mapper.table(&name) {
                used.extend(loops_of(&table).into_iter().flatten());
            }
        }
        let all = loop_device::all().map_err(failed("listing loop devices"))?;
        let unused = all.into_iter().filter(|(device, _)| !used.contains(device));
        let owned = unused.filter_map(|(device, file)| Some((device, owner(&sandboxes, &file)?)));
        Ok(owned.collect())
    }

    fn names(&self) -> Result<Vec<String>, DiskError> {
        let names = self.mapper.names();
        names.map_err(device(&self.instance, "listing devices"))
    }
}

/// The sandbox in whose directory a file is.
fn owner(sandboxes: &Path, file: &Path) -> Option<String> {
    let mut below = file.strip_prefix(sandboxes).ok()?.iter();
    let owner = below.next()?.to_str()?;
    // A file beside the directories is nobody's.
    below.next().map(|_| owner.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_its_directorys() {
        let owner = |file: &str| owner(Path::new("/data/sandboxes"), Path::new(file));
        assert_eq!(owner("/data/sandboxes/a/rootfs.cow").as_deref(), Some("a"));
        for other in ["/data/sandboxes/a", "/data/bases/a/b", "/data/sandboxes"] {
            assert_eq!(owner(other), None, "{other}");
        }
    }
}
