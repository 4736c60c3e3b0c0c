//! Is a build's stored data what was written? Asked before every resume, answered without
//! reading gigabytes.
//!
//! Small files (map, sums, manifest, vmstate) are read and checked whole each time. The
//! data files are checked by *identity* first: inode, size, and the times of their last
//! change, which any write through the file system moves. As long as those are what they
//! were when the content was last known to be right, the content is; when they moved (or
//! were never recorded), every chunk is read and its checksum compared. Decay below the
//! file system is found by the same checksums in `thaw snapshot verify`.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use snapshot_format::{Build, BuildId, BuildStore, FormatError, file_name, verify_data};
use thiserror::Error;

/// Why a build can't be resumed from.
#[derive(Debug, Error)]
pub enum IntegrityError {
    /// It can't be opened: a file is missing, cut or corrupt.
    #[error("Build {build} can't be resumed from")]
    Format {
        /// Which build.
        build: BuildId,
        /// File, offset, expected and found.
        #[source]
        source: FormatError,
    },
    /// A file's content is not what was written.
    #[error("Build {build} can't be resumed from: {fault}")]
    Fault {
        /// Which build.
        build: BuildId,
        /// File, offset, expected and found.
        fault: String,
    },
    /// A file can't be read.
    #[error("Build {build} can't be resumed from: reading {file}")]
    Read {
        /// Which build.
        build: BuildId,
        /// Which file.
        file: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What the file system says of a data file.
///
/// # Errors
/// The file is not there.
pub fn identity(data: &Path) -> io::Result<String> {
    let m = fs::metadata(data)?;
    Ok(format!(
        "{}:{}:{}:{}.{}:{}.{}",
        m.dev(),
        m.ino(),
        m.len(),
        m.mtime(),
        m.mtime_nsec(),
        m.ctime(),
        m.ctime_nsec()
    ))
}

/// A build that may be resumed from, and its device state.
#[derive(Debug)]
pub struct Checked {
    /// The opened build.
    pub build: Build,
    /// The device state.
    pub vmstate: Vec<u8>,
    /// Identities of data files that were read and found right, to be remembered.
    pub verified: Vec<(BuildId, String)>,
}

/// Opens a build for a resume. `known` gives the recorded identity of each build's data.
///
/// # Errors
/// What is wrong with it; nothing was changed.
pub fn check(
    store: &BuildStore,
    id: BuildId,
    known: impl Fn(BuildId) -> Option<String>,
) -> Result<Checked, IntegrityError> {
    let format = |source| IntegrityError::Format { build: id, source };
    let build = store.open(&id).map_err(format)?;
    let vmstate = check_vmstate(&build, id)?;
    let mut verified = Vec::new();
    for entry in build.map().builds() {
        let data = store.path(&entry.id).join(file_name::DATA);
        let found = identity(&data).map_err(|source| IntegrityError::Read {
            build: id,
            file: data.display().to_string(),
            source,
        })?;
        if known(entry.id).as_ref() == Some(&found) {
            continue;
        }
        let owner = if entry.id == id {
            build.clone()
        } else {
            store.open(&entry.id).map_err(format)?
        };
        let faults = verify_data(&owner, &mut |_| {}).map_err(format)?;
        if let Some(fault) = faults.first() {
            return Err(IntegrityError::Fault {
                build: id,
                fault: fault.to_string(),
            });
        }
        verified.push((entry.id, found));
    }
    Ok(Checked {
        build,
        vmstate,
        verified,
    })
}

/// The device state is small and read anyway: always compared.
fn check_vmstate(build: &Build, id: BuildId) -> Result<Vec<u8>, IntegrityError> {
    let path = build.dir().join(file_name::VMSTATE);
    let bytes = fs::read(&path).map_err(|source| IntegrityError::Read {
        build: id,
        file: path.display().to_string(),
        source,
    })?;
    let fault = |what: &str, expected: String, found: String| IntegrityError::Fault {
        build: id,
        fault: format!(
            "{} at offset 0: {what}: expected {expected}, found {found}",
            path.display()
        ),
    };
    let Some(entry) = build.manifest().files.get(file_name::VMSTATE) else {
        return Err(fault("manifest entry", "one".into(), "none".into()));
    };
    if entry.bytes != bytes.len() as u64 {
        return Err(fault(
            "length",
            entry.bytes.to_string(),
            bytes.len().to_string(),
        ));
    }
    let found = crc32c::crc32c(&bytes);
    match entry.crc32c {
        Some(expected) if expected != found => Err(fault(
            "crc32c",
            format!("{expected:#010x}"),
            format!("{found:#010x}"),
        )),
        _ => Ok(bytes),
    }
}
