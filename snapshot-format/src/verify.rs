//! Checks every byte of a build against its checksums, and goes on after the first fault.
//!
//! The manifest covers itself and all other files; the map covers itself, and names the sums of
//! every build it takes pages from; the sums cover themselves and the data. So any flipped bit
//! of any file is found, and so is a file that was exchanged for another intact one.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::build::{Build, disagreement};
use crate::build_id::BuildId;
use crate::build_store::BuildStore;
use crate::data_check::check_data;
use crate::data_file::DataFile;
use crate::error::{Fault, FormatError};
use crate::manifest::{FileEntry, Manifest, file_name};
use crate::memory_map::MemoryMap;
use crate::sparse::file_checksum;
use crate::sums::DataSums;
use crate::working_set::{IgnoredWorkingSet, WorkingSetFile, read_working_set};

/// The most faults that a report lists; further ones are counted.
pub const MAX_FAULTS: usize = 10_000;

/// What is verified beside the build itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifyOptions {
    /// Also the data of every build that the map refers to. Without it those builds only have
    /// to be the ones that the map was written against.
    pub ancestors: bool,
}

/// How far a verification is, for a progress bar.
#[derive(Clone, Copy, Debug)]
pub struct VerifyProgress<'a> {
    /// The file that is being read.
    pub file: &'a Path,
    /// How much of it is verified, in bytes.
    pub done: u64,
    /// Its length in bytes.
    pub total: u64,
}

/// What a verification found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// The build.
    pub build_id: BuildId,
    /// Every fault, up to [`MAX_FAULTS`].
    pub faults: Vec<Fault>,
    /// Faults beyond those.
    pub faults_omitted: u64,
    /// Files that were read.
    pub files: u64,
    /// Their bytes, holes included.
    pub bytes: u64,
    /// The builds that the map refers to, without this one.
    pub ancestors: Vec<BuildId>,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty()
    }

    fn fault(&mut self, fault: Fault) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        } else {
            self.faults_omitted += 1;
        }
    }

    /// The value, or nothing and a fault.
    fn keep<T>(&mut self, file: &Path, result: Result<T, FormatError>) -> Option<T> {
        result
            .map_err(|error| self.fault(as_fault(file, error)))
            .ok()
    }

    fn count(&mut self, bytes: u64) {
        self.files += 1;
        self.bytes += bytes;
    }
}

/// Verifies all files of a build, and that its ancestors are the right ones.
pub fn verify(store: &BuildStore, id: &BuildId) -> VerifyReport {
    verify_with(store, id, VerifyOptions::default(), &mut |_| {})
}

/// As [`verify`], with options and a callback that is told about progress.
pub fn verify_with(
    store: &BuildStore,
    id: &BuildId,
    options: VerifyOptions,
    progress: &mut dyn FnMut(VerifyProgress<'_>),
) -> VerifyReport {
    let report = VerifyReport {
        build_id: *id,
        faults: Vec::new(),
        faults_omitted: 0,
        files: 0,
        bytes: 0,
        ancestors: Vec::new(),
    };
    let dir = store.path(id);
    let mut verifier = Verifier {
        store,
        dir,
        report,
        progress,
    };
    verifier.run(options);
    verifier.report
}

/// Verifies the data of a build alone.
///
/// # Errors
/// Those of reading its sums, without which nothing can be said about the data.
pub fn verify_data(
    build: &Build,
    progress: &mut dyn FnMut(VerifyProgress<'_>),
) -> Result<Vec<Fault>, FormatError> {
    let mut faults = Vec::new();
    let path = build.dir().join(file_name::DATA);
    check_data(
        &path,
        &build.sums()?,
        &mut |fault| faults.push(fault),
        progress,
    )?;
    Ok(faults)
}

struct Verifier<'a> {
    store: &'a BuildStore,
    dir: PathBuf,
    report: VerifyReport,
    progress: &'a mut dyn FnMut(VerifyProgress<'_>),
}

impl Verifier<'_> {
    fn run(&mut self, options: VerifyOptions) {
        if !self.dir.is_dir() {
            let build_id = self.report.build_id;
            let fault = as_fault(&self.dir, FormatError::NotFound { build_id });
            return self.report.fault(fault);
        }
        let manifest_path = self.dir.join(file_name::MANIFEST);
        let manifest = self
            .report
            .keep(&manifest_path, Manifest::open(&manifest_path));
        let map_path = self.dir.join(file_name::MAP);
        let map = self.report.keep(&map_path, MemoryMap::open(&map_path));
        if let Some(manifest) = &manifest {
            self.files(manifest);
            let agree = |map| disagreement(&manifest_path, self.report.build_id, manifest, map);
            if let Some(fault) = map.as_ref().and_then(agree) {
                self.report.fault(fault);
            }
        }
        let own = self.dir.clone();
        self.data(&own);
        if let Some(map) = &map {
            self.working_set(map);
            self.identities(map, options);
        }
    }

    /// Every file in the manifest, and that there are no others.
    fn files(&mut self, manifest: &Manifest) {
        for (name, entry) in &manifest.files {
            let path = self.dir.join(name);
            let checked = self.file(&path, entry);
            self.report.keep(&path, checked);
        }
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        let allowed = [file_name::MANIFEST, file_name::WORKING_SET];
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !allowed.contains(&name.as_str()) && !manifest.files.contains_key(&name) {
                let path = entry.path();
                let fault = Fault::new(&path, 0, "file", "only files of the manifest", name);
                self.report.fault(fault);
            }
        }
    }

    fn file(&mut self, path: &Path, entry: &FileEntry) -> Result<(), FormatError> {
        let reading = FormatError::io("Reading the size of", path);
        let found = fs::metadata(path).map_err(reading)?.len();
        if found != entry.bytes {
            let at = found.min(entry.bytes);
            self.report
                .fault(Fault::new(path, at, "file length", entry.bytes, found));
        }
        let Some(expected) = entry.crc32c else {
            return Ok(());
        };
        let (bytes, found) = file_checksum(path)?;
        self.report.count(bytes);
        (self.progress)(VerifyProgress {
            file: path,
            done: bytes,
            total: bytes,
        });
        if found != expected {
            self.report
                .fault(Fault::checksum(path, 0, "file checksum", expected, found));
        }
        Ok(())
    }

    /// The sums and the data in a build's directory.
    fn data(&mut self, dir: &Path) {
        let (sums_path, path) = (dir.join(file_name::SUMS), dir.join(file_name::DATA));
        if let Some(sums) = self.report.keep(&sums_path, DataSums::open(&sums_path)) {
            self.report.count(sums.stored_bytes());
            let mut faults = Vec::new();
            let checked = check_data(&path, &sums, &mut |fault| faults.push(fault), self.progress);
            faults
                .into_iter()
                .for_each(|fault| self.report.fault(fault));
            self.report.keep(&path, checked);
        }
    }

    /// The working set, if there is one: a restore would ignore a bad one without a word.
    fn working_set(&mut self, map: &MemoryMap) {
        let path = self.dir.join(file_name::WORKING_SET);
        match read_working_set(&self.dir, map) {
            WorkingSetFile::Missing => {}
            WorkingSetFile::Present(set) => self.report.count(set.to_bytes(map).len() as u64),
            WorkingSetFile::Ignored(IgnoredWorkingSet::Corrupt(fault)) => self.report.fault(*fault),
            WorkingSetFile::Ignored(other) => {
                let expected = "readable, and of this build";
                let fault = Fault::new(&path, 0, "working set", expected, other);
                self.report.fault(fault);
            }
        }
    }

    /// That the data of every build in the table is what the map was written against.
    fn identities(&mut self, map: &MemoryMap, options: VerifyOptions) {
        for entry in map.builds() {
            let dir = self.store.path(&entry.id);
            let opened = DataFile::open_in(&dir, entry, map);
            self.report.keep(&dir, opened);
            if entry.id != map.build_id() {
                self.report.ancestors.push(entry.id);
                if options.ancestors {
                    self.data(&dir);
                }
            }
        }
    }
}

/// Whatever is wrong with a file, as a fault of it.
fn as_fault(file: &Path, error: FormatError) -> Fault {
    let (what, expected) = match error {
        FormatError::Corrupt(fault) => return *fault,
        FormatError::Unsupported { what, .. } => (what, "one that this version knows"),
        FormatError::NotFound { .. } | FormatError::AncestorMissing { .. } => ("build", "there"),
        FormatError::AncestorChanged { .. } => ("build", "the data that the map refers to"),
        _ => ("file", "readable"),
    };
    let cause = error
        .source()
        .map_or(String::new(), |source| format!(": {source}"));
    Fault::new(file, 0, what, expected, format!("{error}{cause}"))
}
