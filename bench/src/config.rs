//! What a run needs to know, checked.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::args::{Engine, PageFaultArgs};
use crate::placement::{self, Cpus};

/// A page of the memory that is touched.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// More than 256 MiB leaves what the host keeps ready: first touches get several times slower.
const MAX_FAULTS: u64 = 65_536;

/// One `page-fault` run.
#[derive(Debug)]
pub(crate) struct PageFault {
    pub(crate) json: Option<PathBuf>,
    /// Pages of the memory; each is touched once a round.
    pub(crate) pages: u64,
    pub(crate) rounds: u32,
    pub(crate) cpus: Cpus,
    pub(crate) engines: Vec<Engine>,
    pub(crate) seed: u64,
    /// The directory in which one is made for the build.
    pub(crate) dir: PathBuf,
    pub(crate) explain: bool,
}

impl PageFault {
    pub(crate) fn new(args: PageFaultArgs) -> Result<Self> {
        ensure!(
            (1..=MAX_FAULTS).contains(&args.faults),
            "--faults must be 1 to {MAX_FAULTS}"
        );
        ensure!(args.rounds > 0, "--rounds must be at least 1");
        let mut engines = args.engine;
        engines.dedup();
        let dir = match args.dir {
            Some(dir) => dir,
            None => beside_the_binary()?,
        };
        Ok(Self {
            json: args.json,
            pages: args.faults,
            rounds: args.rounds,
            cpus: placement::choose(args.placement, &placement::allowed()?)?,
            engines,
            seed: args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32)),
            dir,
            explain: args.explain,
        })
    }
}

/// The target directory: on the disk that the project is on, and cleaned with it.
fn beside_the_binary() -> Result<PathBuf> {
    let binary = std::env::current_exe().context("Finding the directory of this binary")?;
    let dir = binary.parent().context("This binary is in no directory")?;
    Ok(dir.to_path_buf())
}
