//! The snapshot format: what maps cost to open and to ask, what data costs to write and to
//! merge, each beside the plainest way to move as many bytes.

mod files;
pub(crate) mod hollow;
mod maps;

use std::fmt::{self, Display, Formatter};

use anyhow::{Context, Result};
use serde::Serialize;

use self::files::Files;
use self::maps::Chains;
use crate::args::FormatPart;
use crate::config::Format;
use crate::host::Host;
use crate::report;
use crate::report::parts::PartsReport;

/// What was the same for all parts.
#[derive(Clone, Debug, Serialize)]
struct Setup {
    rounds: u32,
    seed: u64,
    /// The memory that maps describe.
    guest_bytes: u64,
    /// The extents of such a map.
    extents: u64,
    /// The memory that diffs and merges are about.
    data_bytes: u64,
}

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &Format) -> Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("bench-format-")
        .tempdir_in(&config.dir)
        .with_context(|| format!("Making a directory in {}", config.dir.display()))?;
    let wanted = |part| config.parts.contains(&part);
    let mut parts = Vec::new();
    if wanted(FormatPart::Open) || wanted(FormatPart::Lookup) || wanted(FormatPart::Overlay) {
        let chains = Chains::write(config, dir.path())?;
        if wanted(FormatPart::Open) {
            parts.push(chains.open(config.rounds)?);
        }
        if wanted(FormatPart::Lookup) {
            parts.push(chains.lookup(config.rounds)?);
        }
        if wanted(FormatPart::Overlay) {
            parts.push(chains.overlay(config.rounds)?);
        }
    }
    if wanted(FormatPart::Diff) || wanted(FormatPart::Merge) {
        let files = Files::write(config, dir.path())?;
        if wanted(FormatPart::Diff) {
            parts.push(files.diff(config.rounds)?);
        }
        if wanted(FormatPart::Merge) {
            parts.push(files.merge(config.rounds)?);
        }
    }
    let report = PartsReport {
        bench: "format",
        host: Host::describe(dir.path())?,
        setup: Setup {
            rounds: config.rounds,
            seed: config.seed,
            guest_bytes: config.memory_pages * crate::config::PAGE_BYTES,
            extents: config.extents,
            data_bytes: config.data_pages * crate::config::PAGE_BYTES,
        },
        parts,
    };
    report::publish(&report, config.json.as_deref())
}

impl Display for Setup {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "setup    seed {}; medians of {} rounds after one not counted, then the range",
            self.seed, self.rounds
        )
    }
}
