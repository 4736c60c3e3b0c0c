//! What a run found, as a value: printed for people ([`table`]), serialised for programs.
//!
//! Percentiles over all rounds of a subject, each round by itself, and ratios formed within a
//! round, where both sides had the same machine. There is no mean: one stall would be all of it.

pub(crate) mod latency;
pub(crate) mod parts;
pub(crate) mod ratio;
pub(crate) mod table;

use std::fmt::Display;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use self::latency::Percentiles;
use self::ratio::Ratio;
use crate::args::Order;
use crate::host::Host;
use crate::placement::Cpus;

/// A whole `page-fault` run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PageFaultReport {
    pub(crate) bench: &'static str,
    pub(crate) host: Host,
    pub(crate) setup: Setup,
    /// In the order in which each round measured them.
    pub(crate) subjects: Vec<SubjectReport>,
    /// One for each subject, over the best floor.
    pub(crate) ratios: Vec<Ratio>,
}

/// What was the same for all subjects.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Setup {
    /// How load was made: the next touch begins when the last has ended.
    #[serde(rename = "loop")]
    pub(crate) closed_loop: &'static str,
    /// Where content was when it was asked for.
    pub(crate) source: &'static str,
    /// Who had the memory: no VMM here.
    pub(crate) vmm: &'static str,
    pub(crate) order: Order,
    pub(crate) seed: u64,
    pub(crate) page_bytes: u64,
    pub(crate) rounds: u32,
    /// Rounds before those, not counted.
    pub(crate) warm_up_rounds: u32,
    pub(crate) touches_per_round: u64,
    pub(crate) cpus: Cpus,
}

/// One subject's results.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SubjectReport {
    pub(crate) name: String,
    pub(crate) window_pages: u64,
    /// Of single faults, over all rounds; `None` if not every touch is one fault.
    pub(crate) fault_us: Option<Percentiles>,
    pub(crate) rounds: Vec<RoundReport>,
}

/// One subject in one round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RoundReport {
    pub(crate) fault_us: Option<Percentiles>,
    /// The whole pass divided by the pages it touched.
    pub(crate) pass_us_per_page: f64,
    /// Fault events that the subject says it read, if it says so.
    pub(crate) faults: Option<u64>,
    /// Pages that were read from disk after all.
    pub(crate) pages_from_disk: u64,
}

/// Prints a report, and writes it as JSON where that was asked for.
pub(crate) fn publish(report: &(impl Display + Serialize), json: Option<&Path>) -> Result<()> {
    print!("{report}");
    let Some(path) = json else { return Ok(()) };
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| format!("Writing {}", path.display()))
}
