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
    /// What maps of snapshots cost to open and ask, and data to write and merge.
    Format(FormatArgs),
    /// How fast all of a memory is loaded, compared to bare copying.
    Populate(AheadArgs),
    /// What replaying a working set gains, and what a wrong one costs.
    Replay(AheadArgs),
    /// What many sessions cost: faults, CPU, memory, idleness.
    Sessions(AheadArgs),
    /// How long a network slot takes to get, waiting or built on request.
    Slots(SlotsArgs),
    /// How long a disk takes to clone, and how fast one is flattened.
    Disks(DisksArgs),
    /// How many requests the API answers, and how long one takes beside faults.
    Api(ApiArgs),
    /// How long a VMM takes to be brought back, compared to a bare script of the same calls.
    Restore(RestoreArgs),
    /// Measures device-mapper, in the emulated machine.
    #[command(hide = true)]
    DisksInside(DisksInsideArgs),
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
    /// In which order pages are touched.
    #[arg(long, value_enum, default_value_t = Order::Random)]
    pub(crate) order: Order,
    /// Drop the build from the page cache before each pass; the floor then reads each page
    /// from the disk.
    #[arg(long, conflicts_with = "explain")]
    pub(crate) evicted: bool,
    /// Another handler: an executable that takes a socket and a memory file, as Firecracker's
    /// examples do. May be given several times.
    #[arg(long, value_name = "NAME=PATH", value_parser = parse_peer)]
    pub(crate) peer: Vec<(String, PathBuf)>,
}

fn parse_peer(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), path.into()))
        }
        _ => Err("a peer is NAME=PATH".to_owned()),
    }
}

/// In which order pages are touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Order {
    /// Any page after any other.
    Random,
    /// One after the other.
    Sequential,
    /// Runs of eight, in random order: more like a guest than either.
    Runs,
    /// As a guest did after a resume; the memory is as large as that guest's was then, and
    /// `--faults` is not looked at.
    Recorded,
}

/// `populate`, `replay`, `sessions`.
#[derive(Debug, clap::Args)]
pub(crate) struct AheadArgs {
    /// Also write the report to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Rounds; each measures every way once. Fewer than 3 are no measurement.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) rounds: u32,
    /// Memory that is served, in MiB; at most 256.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub(crate) mib: u64,
    /// Sessions that are idle, for `sessions`.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) idle: u64,
    /// Seed of the order of touches; a random one is chosen and printed.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Where to put the build that is served; a directory beside the binary by default.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct FormatArgs {
    /// Also write the report to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Rounds; each measures every way once. Fewer than 3 are no measurement.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) rounds: u32,
    /// What to measure.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "open,lookup,overlay,diff,merge"
    )]
    pub(crate) part: Vec<FormatPart>,
    /// Memory of the guest that maps describe, in GiB.
    #[arg(long, value_name = "GIB", default_value_t = 64)]
    pub(crate) guest_gib: u64,
    /// Extents of such a map.
    #[arg(long, value_name = "N", default_value_t = 1 << 20)]
    pub(crate) extents: u64,
    /// Memory that is written and merged, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub(crate) data_mib: u64,
    /// Seed of contents and orders; a random one is chosen and printed.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Where to put the builds; a directory beside the binary by default.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

/// `slots`.
#[derive(Debug, clap::Args)]
pub(crate) struct SlotsArgs {
    /// Also write the report to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Rounds; each measures every way once. Fewer than 3 are no measurement.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) rounds: u32,
    /// Slots taken per round and way.
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub(crate) slots: u32,
}

/// `api`.
#[derive(Debug, clap::Args)]
pub(crate) struct ApiArgs {
    /// Also write the report to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Rounds; each measures every way once. Fewer than 3 are no measurement.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) rounds: u32,
    /// Requests a second that should be answered.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub(crate) rate: u64,
    /// How long each way is measured.
    #[arg(long, value_name = "S", default_value_t = 5)]
    pub(crate) seconds: u64,
    /// Connections, each of which has one request at a time.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) connections: usize,
    /// Memory that is faulted in beside the requests, in MiB; at most 256.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub(crate) mib: u64,
    /// The daemon's program; the one beside this binary by default.
    #[arg(long, value_name = "FILE")]
    pub(crate) thaw: Option<PathBuf>,
    /// Seed of the order of touches; a random one is chosen and printed.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// The directory in which one is made for the build; beside this binary by default.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

/// `restore`.
#[derive(Debug, clap::Args)]
pub(crate) struct RestoreArgs {
    /// Also write the report to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Rounds; each measures every way once. Fewer than 3 are no measurement.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) rounds: u32,
    /// Restores per round and way.
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) restores: u32,
    /// The Firecracker to bring back.
    #[arg(
        long,
        value_name = "PROGRAM",
        env = "THAW_FIRECRACKER",
        required_unless_present_any = ["cloud_hypervisor", "qemu"]
    )]
    pub(crate) firecracker: Option<PathBuf>,
    /// The Cloud Hypervisor to bring back, instead.
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) cloud_hypervisor: Option<PathBuf>,
    /// The QEMU to bring back, instead; it has no processes that wait.
    #[arg(
        long,
        value_name = "PROGRAM",
        num_args = 0..=1,
        default_missing_value = "qemu-system-x86_64",
        requires = "inputs"
    )]
    pub(crate) qemu: Option<PathBuf>,
    /// QEMU's preload library; beside this binary by default.
    #[arg(long, value_name = "FILE")]
    pub(crate) preload: Option<PathBuf>,
    /// The directory of the kernel, initial RAM disk and root of a Linux guest with envd, as
    /// `image-build inputs` makes it; the guest is a few instructions when absent.
    #[arg(long, value_name = "DIR")]
    pub(crate) inputs: Option<PathBuf>,
    /// In an emulated machine with Debian's kernel, whose KVM brings up stock guests.
    #[arg(long, requires = "inputs", conflicts_with_all = ["json", "huge_pages", "qemu"])]
    pub(crate) emulated: bool,
    /// The guest's memory is of huge pages (2 MiB); the host needs 128 of them.
    #[arg(long)]
    pub(crate) huge_pages: bool,
}

/// `disks`.
#[derive(Debug, clap::Args)]
pub(crate) struct DisksArgs {
    /// Also write the report to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Rounds; each measures every way once. Fewer than 3 are no measurement.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) rounds: u32,
    /// The larger of the two images that are cloned, in MiB; the smaller has a sixteenth.
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    pub(crate) image_mib: u64,
    /// Data of the image that is flattened, in MiB; a quarter as much is changed.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub(crate) data_mib: u64,
    /// The directory of kernel, initial RAM disk and modules for the machine in which device-mapper
    /// is measured, as `image-build inputs` makes it; not measured when absent.
    #[arg(long, value_name = "DIR")]
    pub(crate) inputs: Option<PathBuf>,
    /// Seed of contents; a random one is chosen and printed.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Where to put the images; a directory beside the binary by default.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DisksInsideArgs {
    #[arg(long)]
    pub(crate) rounds: u32,
    #[arg(long)]
    pub(crate) image_mib: u64,
    #[arg(long)]
    pub(crate) dir: PathBuf,
}

/// What `format` measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatPart {
    /// Opening and validating a map.
    Open,
    /// Finding a page in one.
    Lookup,
    /// The complete map of a diff.
    Overlay,
    /// Writing a diff.
    Diff,
    /// Merging a chain.
    Merge,
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
    /// The same, spinning for 50 µs after each fault.
    OursSpin,
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
    /// How to wait for a fault.
    #[arg(long, value_enum, default_value_t = Wait::Poll)]
    pub(crate) wait: Wait,
    /// Copy each page from its place in this file instead of from one hot page.
    #[arg(long)]
    pub(crate) source: Option<PathBuf>,
    /// How to make sure that the source is in the page cache, before each copy.
    #[arg(long, value_enum, requires = "source")]
    pub(crate) ask: Option<Ask>,
}

/// Ways to wait for a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Wait {
    /// `poll`, then `read`.
    Poll,
    /// In `read`, of a descriptor that was made blocking.
    Block,
    /// `read` again and again, yielding in between.
    Busy,
    /// A multishot poll of an io_uring, then `read`.
    Ring,
}

/// Ways not to wait for the disk in a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Ask {
    /// Ask `mincore`, then copy from the mapping.
    Mincore,
    /// Read into one hot page with `RWF_NOWAIT`, then copy from that.
    Nowait,
    /// Wait for the disk: read with `O_DIRECT` into one hot page, then copy from that.
    Direct,
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
    /// How long the worker spins, instead of waiting in the kernel.
    #[arg(long, default_value_t = 0)]
    pub(crate) spin_us: u64,
}
