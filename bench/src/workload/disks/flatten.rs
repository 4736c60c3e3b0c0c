//! A base and its changes made one image, beside a plain copy of as many bytes from and to the same
//! places. Both end when all is durable.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use appliance::disks::cow::{CHUNK_BYTES, CHUNK_SECTORS, Changes};
use appliance::disks::files;

use super::write_image;
use crate::config;
use crate::report::parts::{Bound, Part};
use crate::workload::rounds::interleaved;

/// What a plain copy hands to the kernel at a time.
const IO_BYTES: u64 = 1 << 20;
/// Neighbouring chunks that were changed together: 256 KiB, as a guest writes files.
const RUN_CHUNKS: u64 = 64;

struct Files {
    base: PathBuf,
    changes: PathBuf,
    target: PathBuf,
    base_bytes: u64,
    /// `(from, to, bytes)` of the changes, neighbours as one.
    runs: Vec<(u64, u64, u64)>,
}

pub(super) fn measure(config: &config::Disks, dir: &Path) -> Result<Part> {
    let files = Files::write(config, dir)?;
    let bytes = files.base_bytes + files.runs.iter().map(|run| run.2).sum::<u64>();
    let rate = |seconds: f64| bytes as f64 / seconds / 1e6;
    let samples = interleaved(
        config.rounds,
        vec![
            ("plain copy".into(), Box::new(|| Ok(rate(files.plain()?)))),
            ("flatten".into(), Box::new(|| Ok(rate(files.flatten()?)))),
        ],
    )?;
    let about = format!(
        "a base with {} MiB of data and {} MiB of changes to one image, all durable at the end; the \
         sources are in the page cache; plain: reads and writes of 1 MiB, one after the other",
        files.base_bytes >> 20,
        (bytes - files.base_bytes) >> 20
    );
    Ok(Part::new("flatten", about, "MB/s", samples)
        .ratio("flatten", "plain copy")
        .ratio_goal(Bound::AtLeast(0.8)))
}

impl Files {
    fn write(config: &config::Disks, dir: &Path) -> Result<Self> {
        let [base, changes, target] = ["base", "changes", "target"].map(|name| dir.join(name));
        write_image(&base, config.data_mib, config.seed)?;
        let base_bytes = config.data_mib << 20;
        // A second half without data: it must not cost anything.
        File::options()
            .write(true)
            .open(&base)?
            .set_len(base_bytes * 2)?;
        write_changes(&changes, base_bytes / CHUNK_BYTES)?;
        let read = Changes::read(&File::open(&changes)?).context("Reading the changes back")?;
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        for changed in &read.changed {
            match runs.last_mut() {
                Some((from, to, bytes))
                    if *from + *bytes == changed.stored_at && *to + *bytes == changed.at =>
                {
                    *bytes += CHUNK_BYTES;
                }
                _ => runs.push((changed.stored_at, changed.at, CHUNK_BYTES)),
            }
        }
        Ok(Self {
            base,
            changes,
            target,
            base_bytes,
            runs,
        })
    }

    fn flatten(&self) -> Result<f64> {
        let started = Instant::now();
        let copied = files::flatten(&self.base, &self.changes, &self.target)?;
        File::open(&self.target)?.sync_all()?;
        let seconds = started.elapsed().as_secs_f64();
        let expected = self.base_bytes + self.runs.iter().map(|run| run.2).sum::<u64>();
        ensure!(copied == expected, "Copied {copied} bytes, not {expected}");
        fs::remove_file(&self.target)?;
        Ok(seconds)
    }

    fn plain(&self) -> Result<f64> {
        let started = Instant::now();
        let target = File::create(&self.target)?;
        target.set_len(self.base_bytes * 2)?;
        let mut buffer = vec![0; IO_BYTES as usize];
        let mut copy = |source: &File, from: u64, to: u64, bytes: u64| -> Result<()> {
            let mut at = 0;
            while at < bytes {
                let part = &mut buffer[..(bytes - at).min(IO_BYTES) as usize];
                source.read_exact_at(part, from + at)?;
                target.write_all_at(part, to + at)?;
                at += part.len() as u64;
            }
            Ok(())
        };
        copy(&File::open(&self.base)?, 0, 0, self.base_bytes)?;
        let changes = File::open(&self.changes)?;
        for (from, to, bytes) in &self.runs {
            copy(&changes, *from, *to, *bytes)?;
        }
        target.sync_all()?;
        let seconds = started.elapsed().as_secs_f64();
        fs::remove_file(&self.target)?;
        Ok(seconds)
    }
}

/// A file as the kernel's persistent snapshots write it, with every fourth run of a disk changed.
fn write_changes(path: &Path, chunks: u64) -> Result<()> {
    let pairs = CHUNK_BYTES / 16;
    let changed = (0..chunks).filter(|chunk| (chunk / RUN_CHUNKS).is_multiple_of(4));
    let file = File::create(path)?;
    let header = [0x7041_6e53_u32, 1, 1, CHUNK_SECTORS as u32].map(u32::to_le_bytes);
    file.write_all_at(&header.concat(), 0)?;
    let mut last = 0;
    for (number, chunk) in changed.enumerate() {
        let (area, slot) = (number as u64 / pairs, number as u64 % pairs);
        let area_chunk = 1 + area * (pairs + 1);
        let stored = area_chunk + 1 + slot;
        let pair = [chunk.to_le_bytes(), stored.to_le_bytes()].concat();
        file.write_all_at(&pair, area_chunk * CHUNK_BYTES + slot * 16)?;
        file.write_all_at(&[chunk as u8; CHUNK_BYTES as usize], stored * CHUNK_BYTES)?;
        last = area;
    }
    file.set_len((1 + (last + 2) * (pairs + 1)) * CHUNK_BYTES)?;
    Ok(file.sync_all()?)
}
