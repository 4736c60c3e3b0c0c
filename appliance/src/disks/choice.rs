//! Which of the ways a host's disks go, found by trying.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::snapshots::{self, Snapshots};
use super::{Backend, DiskError, cow, files};
use crate::config::DiskBackend;

/// Chooses a way, and says why.
///
/// # Errors
/// The data directory can't be written, or the configured way can't be gone here.
pub(super) fn choose(
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
