//! What a run needs to know, checked.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::args::{
    AheadArgs, ApiArgs, DisksArgs, Engine, FormatArgs, FormatPart, Order, PageFaultArgs,
    RestoreArgs, SlotsArgs,
};
use crate::order;
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
    pub(crate) order: Order,
    pub(crate) evicted: bool,
    pub(crate) peers: Vec<(String, PathBuf)>,
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
        let dir = args.dir.map_or_else(beside_the_binary, Ok)?;
        Ok(Self {
            json: args.json,
            pages: match args.order {
                Order::Recorded => order::recorded_memory(),
                Order::Random | Order::Sequential | Order::Runs => args.faults,
            },
            rounds: args.rounds,
            cpus: placement::choose(args.placement, &placement::allowed()?)?,
            engines,
            seed: args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32)),
            dir,
            explain: args.explain,
            order: args.order,
            evicted: args.evicted,
            peers: args.peer,
        })
    }
}

/// One `populate`, `replay` or `sessions` run.
#[derive(Debug)]
pub(crate) struct Ahead {
    pub(crate) json: Option<PathBuf>,
    pub(crate) rounds: u32,
    pub(crate) pages: u64,
    pub(crate) idle: u64,
    pub(crate) cpus: Cpus,
    pub(crate) seed: u64,
    pub(crate) dir: PathBuf,
}

impl Ahead {
    pub(crate) fn new(args: AheadArgs) -> Result<Self> {
        ensure!(args.rounds > 0, "--rounds must be at least 1");
        ensure!((1..=256).contains(&args.mib), "--mib must be 1 to 256");
        ensure!((1..=4000).contains(&args.idle), "--idle must be 1 to 4000");
        Ok(Self {
            json: args.json,
            rounds: args.rounds,
            pages: (args.mib << 20) / PAGE_BYTES,
            idle: args.idle,
            cpus: placement::choose(crate::args::Placement::Same, &placement::allowed()?)?,
            seed: args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32)),
            dir: args.dir.map_or_else(beside_the_binary, Ok)?,
        })
    }
}

/// One `api` run.
#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) json: Option<PathBuf>,
    pub(crate) rounds: u32,
    pub(crate) rate: u64,
    pub(crate) seconds: u64,
    pub(crate) connections: usize,
    pub(crate) pages: u64,
    pub(crate) cpus: Cpus,
    pub(crate) thaw: PathBuf,
    pub(crate) seed: u64,
    pub(crate) dir: PathBuf,
}

impl Api {
    pub(crate) fn new(args: ApiArgs) -> Result<Self> {
        ensure!(args.rounds > 0, "--rounds must be at least 1");
        ensure!((1..=256).contains(&args.mib), "--mib must be 1 to 256");
        ensure!(args.seconds > 0, "--seconds must be at least 1");
        ensure!(
            (1..=1_000_000).contains(&args.rate),
            "--rate must be 1 to 1000000"
        );
        ensure!(
            (1..=1024).contains(&args.connections),
            "--connections must be 1 to 1024"
        );
        let here = beside_the_binary()?;
        Ok(Self {
            json: args.json,
            rounds: args.rounds,
            rate: args.rate,
            seconds: args.seconds,
            connections: args.connections,
            pages: (args.mib << 20) / PAGE_BYTES,
            cpus: placement::choose(crate::args::Placement::Same, &placement::allowed()?)?,
            thaw: args.thaw.unwrap_or_else(|| here.join("thaw")),
            seed: args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32)),
            dir: args.dir.unwrap_or(here),
        })
    }
}

/// One `format` run.
#[derive(Debug)]
pub(crate) struct Format {
    pub(crate) json: Option<PathBuf>,
    pub(crate) rounds: u32,
    pub(crate) parts: Vec<FormatPart>,
    /// Pages of the memory that maps describe.
    pub(crate) memory_pages: u64,
    /// Extents of such a map.
    pub(crate) extents: u64,
    /// Pages that are written and merged.
    pub(crate) data_pages: u64,
    pub(crate) seed: u64,
    /// The directory in which one is made for the builds.
    pub(crate) dir: PathBuf,
}

impl Format {
    pub(crate) fn new(args: FormatArgs) -> Result<Self> {
        ensure!(args.rounds > 0, "--rounds must be at least 1");
        ensure!(
            (1..=16_384).contains(&args.guest_gib),
            "--guest-gib must be 1 to 16384"
        );
        ensure!(
            (1..=4096).contains(&args.data_mib),
            "--data-mib must be 1 to 4096"
        );
        let memory_pages = (args.guest_gib << 30) / PAGE_BYTES;
        // Runs and gaps between them, each of at least a page, and room for both to vary.
        let most = memory_pages / 2;
        ensure!(
            (512..=most).contains(&args.extents) && args.extents.is_multiple_of(2),
            "--extents must be even, and 512 to {most} in a guest of {} GiB",
            args.guest_gib
        );
        Ok(Self {
            json: args.json,
            rounds: args.rounds,
            parts: args.part,
            memory_pages,
            extents: args.extents,
            data_pages: (args.data_mib << 20) / PAGE_BYTES,
            seed: args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32)),
            dir: args.dir.map_or_else(beside_the_binary, Ok)?,
        })
    }
}

/// One `slots` run.
#[derive(Debug)]
pub(crate) struct Slots {
    pub(crate) json: Option<PathBuf>,
    pub(crate) rounds: u32,
    /// Taken per round and way.
    pub(crate) slots: u32,
}

impl Slots {
    pub(crate) fn new(args: SlotsArgs) -> Result<Self> {
        ensure!(args.rounds > 0, "--rounds must be at least 1");
        ensure!(
            (10..=10_000).contains(&args.slots),
            "--slots must be 10 to 10000"
        );
        Ok(Self {
            json: args.json,
            rounds: args.rounds,
            slots: args.slots,
        })
    }
}

/// One `restore` run.
#[derive(Debug)]
pub(crate) struct Restore {
    pub(crate) json: Option<PathBuf>,
    pub(crate) rounds: u32,
    /// Per round and way.
    pub(crate) restores: u32,
    pub(crate) vmm: Vmm,
    pub(crate) huge_pages: bool,
    /// What a Linux guest is made of; a hand-made one when absent.
    pub(crate) inputs: Option<PathBuf>,
    /// In an emulated machine.
    pub(crate) emulated: bool,
}

/// What is brought back.
#[derive(Clone, Debug)]
pub(crate) enum Vmm {
    Firecracker(PathBuf),
    CloudHypervisor(PathBuf),
    Qemu { program: PathBuf, preload: PathBuf },
}

impl Restore {
    pub(crate) fn new(args: RestoreArgs) -> Result<Self> {
        ensure!(args.rounds > 0, "--rounds must be at least 1");
        ensure!(
            (1..=10_000).contains(&args.restores),
            "--restores must be 1 to 10000"
        );
        let vmm = match (args.qemu, args.cloud_hypervisor, args.firecracker) {
            (Some(program), ..) => Vmm::Qemu {
                program,
                preload: args.preload.map_or_else(preload_beside_this, Ok)?,
            },
            (None, Some(program), _) => Vmm::CloudHypervisor(program),
            (None, None, Some(program)) => Vmm::Firecracker(program),
            (None, None, None) => bail!("--firecracker, --cloud-hypervisor or --qemu is needed"),
        };
        Ok(Self {
            json: args.json,
            rounds: args.rounds,
            restores: args.restores,
            vmm,
            huge_pages: args.huge_pages,
            inputs: args.inputs,
            emulated: args.emulated,
        })
    }
}

fn preload_beside_this() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    Ok(program.with_file_name("libuffd_preload.so"))
}

/// One `disks` run.
#[derive(Debug)]
pub(crate) struct Disks {
    pub(crate) json: Option<PathBuf>,
    pub(crate) rounds: u32,
    pub(crate) image_mib: u64,
    pub(crate) data_mib: u64,
    pub(crate) inputs: Option<PathBuf>,
    pub(crate) seed: u64,
    pub(crate) dir: PathBuf,
}

impl Disks {
    pub(crate) fn new(args: DisksArgs) -> Result<Self> {
        ensure!(args.rounds > 0, "--rounds must be at least 1");
        ensure!(
            (64..=16_384).contains(&args.image_mib),
            "--image-mib must be 64 to 16384"
        );
        ensure!(
            (8..=4096).contains(&args.data_mib),
            "--data-mib must be 8 to 4096"
        );
        Ok(Self {
            json: args.json,
            rounds: args.rounds,
            image_mib: args.image_mib,
            data_mib: args.data_mib,
            inputs: args.inputs,
            seed: args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32)),
            dir: args.dir.map_or_else(beside_the_binary, Ok)?,
        })
    }
}

/// The target directory: on the disk that the project is on, and cleaned with it.
fn beside_the_binary() -> Result<PathBuf> {
    let binary = std::env::current_exe().context("Finding the directory of this binary")?;
    let dir = binary.parent().context("This binary is in no directory")?;
    Ok(dir.to_path_buf())
}
