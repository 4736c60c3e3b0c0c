//! The command line, as typed. What it means is decided in [`config`](crate::config).
//!
//! The hidden subcommands are the processes of one run: the binary starts itself again
//! under them, so that the faulter and each subject have an address space, a CPU and a
//! fate of their own.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

/// Measures Thaw against baselines, interleaved in one run.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// How long one page fault takes, compared to a minimal read-and-copy loop.
    PageFault(PageFaultArgs),
    /// How long commands and files take through the guest's daemon, and what it costs idle.
    Envd(crate::envd::Args),
    /// Touches memory that a subject serves.
    #[command(hide = true)]
    Faulter(FaulterArgs),
    /// Serves faults by the minimal loop.
    #[command(hide = true)]
    Floor(FloorArgs),
    /// Serves faults by the real engine.
    #[command(hide = true)]
    Engine(EngineArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct PageFaultArgs {
    /// Also write the report to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Pages of 4 KiB touched per round, each once; at most 65536 (256 MiB).
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    pub(crate) faults: u64,
    /// Rounds; each measures every subject once. Fewer than 3 are no measurement.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) rounds: u32,
    /// Whether faulter and worker share a core.
    #[arg(long, value_enum, default_value_t = Placement::Same)]
    pub(crate) placement: Placement,
    /// What to compare with the floor.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "ours")]
    pub(crate) engine: Vec<Engine>,
    /// Seed of the order of touches; a random one is chosen and printed.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Where to put the build that is served; a directory beside the binary by default.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Also measure floors that add one of the engine's costs after the other.
    #[arg(long)]
    pub(crate) explain: bool,
}

/// Where the faulter and the worker run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Placement {
    /// Both on one core.
    Same,
    /// On two cores.
    Other,
}

/// An engine to be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// Thaw's own.
    Ours,
}

#[derive(Debug, clap::Args)]
pub(crate) struct FaulterArgs {
    #[arg(long)]
    pub(crate) cpu: usize,
}

#[derive(Debug, clap::Args)]
pub(crate) struct FloorArgs {
    #[arg(long)]
    pub(crate) cpu: usize,
    /// Where hand-offs arrive.
    #[arg(long)]
    pub(crate) socket: PathBuf,
    /// Wait in an io_uring instead of in poll(2).
    #[arg(long)]
    pub(crate) ring: bool,
    /// Copy each page from its place in this file instead of from one hot page.
    #[arg(long)]
    pub(crate) source: Option<PathBuf>,
    /// How to make sure that the source is in the page cache, before each copy.
    #[arg(long, value_enum, requires = "source")]
    pub(crate) ask: Option<Ask>,
}

/// Ways not to wait for the disk in a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Ask {
    /// Ask `mincore`, then copy from the mapping.
    Mincore,
    /// Read into one hot page with `RWF_NOWAIT`, then copy from that.
    Nowait,
}

#[derive(Debug, clap::Args)]
pub(crate) struct EngineArgs {
    #[arg(long)]
    pub(crate) cpu: usize,
    /// Where the daemon's half of the control connection is taken.
    #[arg(long)]
    pub(crate) control: PathBuf,
    /// Pages installed around a fault.
    #[arg(long)]
    pub(crate) window_pages: u64,
}
