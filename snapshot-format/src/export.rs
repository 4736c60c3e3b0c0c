//! Export: a build and all that it needs, as one tar stream.
//!
//! Nothing in the stream depends on who writes it when: no times, no owners. Holes don't travel;
//! a file that has any is preceded by a list of what is between them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::build::Build;
use crate::build_id::BuildId;
use crate::build_store::BuildStore;
use crate::error::FormatError;
use crate::manifest::file_name;
use crate::sparse::next_data;
use crate::stream_layout::{INDEX_NAME, MAX_RUNS, StreamIndex, entry_name, runs_name};
use crate::working_set::WorkingSetFile;

/// How often an export says how far it is.
const REPORT_BYTES: u64 = 1 << 20;

/// What an export came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSummary {
    /// The builds in the stream, in its order; the last is the one that was asked for.
    pub builds: Vec<BuildId>,
    /// The bytes of their files, without holes.
    pub bytes: u64,
}

/// How far an export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportProgress {
    /// The build whose files are written.
    pub build: BuildId,
    /// Bytes of files that are written.
    pub done: u64,
    /// Bytes of files that will be, as far as can be told from the disk space they take.
    pub total: u64,
}

impl BuildStore {
    /// Writes a build, and every build that it or one of those takes pages from, as one stream
    /// for [`BuildStore::import`].
    ///
    /// Nothing is compared with checksums here; the import does that. `progress` is called for
    /// about every mebibyte.
    ///
    /// # Errors
    /// Those of [`BuildStore::open_cold`]; [`FormatError::Io`], also from `to`.
    pub fn export(
        &self,
        id: &BuildId,
        to: impl Write,
        progress: &mut dyn FnMut(ExportProgress),
    ) -> Result<ExportSummary, FormatError> {
        let builds = self.with_ancestors(id)?;
        let mut export = Export {
            tar: tar::Builder::new(to),
            bytes: 0,
            progress: ExportProgress {
                build: *id,
                done: 0,
                total: self.disk_bytes(&builds)?,
            },
            report: progress,
        };
        let index = StreamIndex::new(builds.clone()).to_bytes();
        export.entry(INDEX_NAME, index.len() as u64, index.as_slice())?;
        for id in &builds {
            export.progress.build = *id;
            export.build(&self.open_cold(id)?)?;
        }
        let flushed = export.tar.into_inner().and_then(|mut to| to.flush());
        flushed.map_err(FormatError::io(
            "Writing",
            Path::new("the end of the stream"),
        ))?;
        Ok(ExportSummary {
            builds,
            bytes: export.bytes,
        })
    }

    /// The disk space of the files of these builds.
    fn disk_bytes(&self, builds: &[BuildId]) -> Result<u64, FormatError> {
        let mut bytes = 0;
        for id in builds {
            for name in self.open_cold(id)?.manifest().files.keys() {
                let path = self.path(id).join(name);
                let metadata = std::fs::metadata(&path);
                let metadata = metadata.map_err(FormatError::io("Reading the size of", &path))?;
                bytes += metadata.len().min(metadata.blocks() * 512);
            }
        }
        Ok(bytes)
    }

    /// A build and everything that has to be published before it, ancestors first.
    fn with_ancestors(&self, id: &BuildId) -> Result<Vec<BuildId>, FormatError> {
        let (mut known, mut builds) = (BTreeSet::from([*id]), Vec::new());
        let mut wanted = vec![*id];
        while let Some(id) = wanted.pop() {
            let build = self.open_cold(&id)?;
            let named = build.map().builds().iter().map(|entry| entry.id);
            wanted.extend(named.filter(|named| known.insert(*named)));
            builds.push((build.map().generation(), id));
        }
        // A map names only builds of lower generations than its own.
        builds.sort_unstable();
        Ok(builds.into_iter().map(|(_, id)| id).collect())
    }
}

struct Export<'a, W: Write> {
    tar: tar::Builder<W>,
    bytes: u64,
    progress: ExportProgress,
    report: &'a mut dyn FnMut(ExportProgress),
}

impl<W: Write> Export<'_, W> {
    fn build(&mut self, build: &Build) -> Result<(), FormatError> {
        let id = build.id();
        // From memory: what the rest of the stream follows is what was judged.
        let manifest = build.manifest().to_bytes()?;
        let name = entry_name(&id, file_name::MANIFEST);
        self.entry(&name, manifest.len() as u64, manifest.as_slice())?;
        for (file, entry) in &build.manifest().files {
            self.file(&id, file, &build.dir().join(file), entry.bytes)?;
        }
        if let WorkingSetFile::Present(set) = build.working_set() {
            let bytes = set.to_bytes(build.map());
            let name = entry_name(&id, file_name::WORKING_SET);
            self.entry(&name, bytes.len() as u64, bytes.as_slice())?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        id: &BuildId,
        name: &str,
        path: &Path,
        bytes: u64,
    ) -> Result<(), FormatError> {
        let file = File::open(path).map_err(FormatError::io("Opening", path))?;
        let runs = runs(&file, bytes).map_err(FormatError::io("Seeking in", path))?;
        let runs = if runs.len() > MAX_RUNS {
            vec![Range {
                start: 0,
                end: bytes,
            }]
        } else {
            runs
        };
        let length = runs.iter().map(|run| run.end - run.start).sum();
        if length != bytes {
            let list: Vec<u8> = runs
                .iter()
                .flat_map(|run| [run.start.to_le_bytes(), (run.end - run.start).to_le_bytes()])
                .flatten()
                .collect();
            self.entry(&runs_name(id, name), list.len() as u64, list.as_slice())?;
        }
        let content = RunReader {
            file: &file,
            runs: runs.into_iter(),
            run: 0..0,
        };
        self.entry(&entry_name(id, name), length, content)
    }

    fn entry(&mut self, name: &str, bytes: u64, content: impl Read) -> Result<(), FormatError> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(bytes);
        header.set_mode(0o644);
        header.set_mtime(0);
        // One byte more would go unnoticed, one less would shift the rest of the stream.
        let mut content = Exactly {
            content,
            left: bytes,
            unreported: 0,
            progress: &mut self.progress,
            report: &mut *self.report,
        };
        self.tar
            .append_data(&mut header, name, &mut content)
            .map_err(FormatError::io("Writing", Path::new(name)))?;
        self.bytes += bytes;
        Ok(())
    }
}

/// The parts of a file that are not holes.
fn runs(file: &File, bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let (mut runs, mut at) = (Vec::new(), 0);
    while at < bytes {
        let Some(run) = next_data(file, at, bytes)? else {
            break;
        };
        at = run.end;
        runs.push(run);
    }
    Ok(runs)
}

/// Reads the parts of a file one after the other.
struct RunReader<'a> {
    file: &'a File,
    runs: std::vec::IntoIter<Range<u64>>,
    run: Range<u64>,
}

impl Read for RunReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.run.is_empty() {
            match self.runs.next() {
                Some(run) => self.run = run,
                None => return Ok(0),
            }
        }
        let left = usize::try_from(self.run.end - self.run.start).unwrap_or(usize::MAX);
        let most = buffer.len().min(left);
        let read = self.file.read_at(&mut buffer[..most], self.run.start)?;
        self.run.start += read as u64;
        Ok(read)
    }
}

/// Refuses to end early, and says how far it is.
struct Exactly<'a, R> {
    content: R,
    left: u64,
    unreported: u64,
    progress: &'a mut ExportProgress,
    report: &'a mut dyn FnMut(ExportProgress),
}

impl<R: Read> Read for Exactly<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.content.read(&mut buffer[..most])?;
        if read == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= read as u64;
        self.progress.done += read as u64;
        self.unreported += read as u64;
        if self.unreported >= REPORT_BYTES || self.left == 0 {
            self.unreported = 0;
            (self.report)(*self.progress);
        }
        Ok(read)
    }
}
