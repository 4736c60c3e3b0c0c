//! Disks: what a clone costs with a small and with a large image, and how fast one is flattened,
//! each beside a plain copy.

mod flatten;
pub(crate) mod mapped;
mod reflinked;

use std::fmt::{self, Display, Formatter};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use appliance::config::{DiskBackend, DisksConfig};
use appliance::disks::{Disks, Source};
use nix::fcntl::posix_fallocate;
use serde::Serialize;

use crate::config;
use crate::host::Host;
use crate::report;
use crate::report::parts::PartsReport;
use crate::report::ratio::median;

/// Clones per round and image; their median is the round's sample.
const CLONES: usize = 20;

/// What was the same for all parts.
#[derive(Clone, Debug, Serialize)]
struct Setup {
    rounds: u32,
    seed: u64,
    image_mib: u64,
    data_mib: u64,
    /// What was not measured, and why.
    skipped: Vec<String>,
}

impl Display for Setup {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "setup    seed {}; medians of {} rounds after one not counted, then the range",
            self.seed, self.rounds
        )?;
        for skipped in &self.skipped {
            write!(f, "\n  not measured: {skipped}")?;
        }
        Ok(())
    }
}

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &config::Disks) -> Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("bench-disks-")
        .tempdir_in(&config.dir)
        .with_context(|| format!("Making a directory in {}", config.dir.display()))?;
    let (mut parts, mut skipped) = (Vec::new(), Vec::new());
    for (name, measured) in [
        ("clone by reflink", reflinked::measure(config, dir.path())),
        ("clone by device-mapper", mapped::measure(config)),
        ("flatten", flatten::measure(config, dir.path()).map(Ok)),
    ] {
        match measured? {
            Ok(part) => parts.push(part),
            Err(reason) => skipped.push(format!("{name}: {reason}")),
        }
    }
    let report = PartsReport {
        bench: "disks",
        host: Host::describe(dir.path())?,
        setup: Setup {
            rounds: config.rounds,
            seed: config.seed,
            image_mib: config.image_mib,
            data_mib: config.data_mib,
            skipped,
        },
        parts,
    };
    report::publish(&report, config.json.as_deref())
}

/// Disks by one way, in a directory of their own.
struct Subject {
    disks: Disks,
    dir: PathBuf,
}

impl Subject {
    fn start(
        backend: DiskBackend,
        cow_mb: Option<u64>,
        dir: &Path,
        images: &[PathBuf],
    ) -> Result<Self> {
        let config = DisksConfig {
            backend,
            cow_mb,
            ..DisksConfig::default()
        };
        Ok(Self {
            disks: Disks::start(&config, "bench", dir, images)?,
            dir: dir.to_owned(),
        })
    }

    /// Milliseconds for one disk from an image: the median of a few, each removed before the next.
    fn clone(&self, image: &Path) -> Result<f64> {
        let source = Source::Image {
            path: image.to_owned(),
            size_mb: None,
        };
        let place = self.dir.join("clone");
        let mut samples = Vec::new();
        for _ in 0..CLONES {
            fs::create_dir_all(&place)?;
            let started = Instant::now();
            self.disks.make("clone", &source, &place)?;
            samples.push(started.elapsed().as_secs_f64() * 1000.0);
            self.disks.remove("clone");
            fs::remove_dir_all(&place)?;
        }
        Ok(median(&samples))
    }
}

/// Writes an image without a hole.
fn write_image(path: &Path, mib: u64, seed: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("Making {}", path.display()))?;
    fill_image(file, mib, seed)
}

/// The same with room for all of it from the start, as tools that build images make it: the file
/// system finds it in one place.
fn write_image_in_one(path: &Path, mib: u64, seed: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("Making {}", path.display()))?;
    posix_fallocate(&file, 0, i64::try_from(mib << 20)?)
        .with_context(|| format!("Allocating {mib} MiB; use --dir or a smaller --image-mib"))?;
    fill_image(file, mib, seed)
}

fn fill_image(mut file: File, mib: u64, seed: u64) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut block = vec![0; 1 << 20];
    random.fill(&mut block);
    for number in 0..mib {
        block[..8].copy_from_slice(&number.to_le_bytes());
        if let Err(error) = file.write_all(&block) {
            bail!("Writing an image of {mib} MiB: {error}; use --dir or a smaller --image-mib");
        }
    }
    Ok(file.sync_all()?)
}
