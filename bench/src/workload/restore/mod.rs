//! A restore by the driver, from the request until the VMM has let the guest run and until the guest's
//! first word, beside the same VMM driven by a bare script of the same calls; both with a process that was
//! started before the request, and without.
//!
//! The guest is a few instructions that touch a few pages and say so on the serial port: what is measured is
//! everything around it. Closed loop, one restore at a time; the build is in the page cache, and one engine
//! serves all ways.

mod bare;
mod bare_cloud;
mod serving;
mod ways;

use std::cell::RefCell;
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use appliance::network::{Egress, SlotIndex, Slots};
use appliance::vmm::own_user::Users;
use appliance::vmm::ready::{Counts, ReadyVmms};
use appliance::vmm::{
    DiskLimits, Driver, GuestShape, Paging, Place, cloud_hypervisor, firecracker, launch,
};
use http_api::wire::NetworkPolicy;
use serde::Serialize;
use snapshot_format::{BuildId, BuildStore, PublishInfo};
use tokio::runtime::Runtime;
use uffd_engine::dirty::Capture;

use self::serving::Serving;
use self::ways::{Took, Way};
use crate::config::{self, Vmm};
use crate::host::Host;
use crate::placement;
use crate::report;
use crate::report::latency::{Latencies, Percentiles};
use crate::report::parts::{Bound, Part, PartsReport};
use crate::workload::rounds::interleaved;

const MEMORY_MB: u32 = 64;
const PATIENCE: Duration = Duration::from_secs(30);
/// As the daemon's configuration has it.
const FIRST_USER: u32 = 200_000;
/// The slot of restores without a process that waits; it is in use all the time.
const OWN_SLOT: SlotIndex = SlotIndex(0);
/// The slot of those with one, which is given back after each.
const POOLED_SLOT: SlotIndex = SlotIndex(1);

/// What was the same for all parts, and what was seen of each in all rounds.
#[derive(Clone, Debug, Serialize)]
struct Setup {
    rounds: u32,
    restores: u32,
    vmm: String,
    memory_mb: u32,
    page_bytes: u64,
    latencies_us: Vec<(String, Percentiles)>,
}

impl Display for Setup {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "setup    {}, {} MiB in pages of {} KiB; {} restores per round and way, medians of {} rounds after one not \
             counted, then the range",
            self.vmm,
            self.memory_mb,
            self.page_bytes >> 10,
            self.restores,
            self.rounds
        )?;
        let title = "all rounds, ms";
        write!(
            f,
            "\n\n  {title:42}{:>7}{:>9}{:>9}{:>9}{:>9}{:>9}",
            "count", "p50", "p90", "p99", "p99.9", "max"
        )?;
        for (name, us) in &self.latencies_us {
            write!(
                f,
                "\n  {name:42}{:>7}{:>9.3}{:>9.3}{:>9.3}{:>9.3}{:>9.3}",
                us.count,
                us.p50 / 1e3,
                us.p90 / 1e3,
                us.p99 / 1e3,
                us.p99_9 / 1e3,
                us.max / 1e3
            )?;
        }
        Ok(())
    }
}

/// Touches 64 pages and says `ok`, over and over; not so often that what reads it is what is measured.
/// In 64-bit mode for the one, in 32-bit mode for the other.
fn guest(vmm: &Vmm) -> Vec<u8> {
    match vmm {
        Vmm::Firecracker(_) => firecracker::probe_guest::elf_around(&[
            0x48, 0xC7, 0xC6, 0x00, 0x00, 0x00, 0x01, // again: mov rsi, 0x1000000
            0xB9, 0x40, 0x00, 0x00, 0x00, // mov ecx, 64
            0x48, 0xFF, 0x06, // page: inc qword [rsi]
            0x48, 0x81, 0xC6, 0x00, 0x10, 0x00, 0x00, // add rsi, 4096
            0xFF, 0xC9, // dec ecx
            0x75, 0xF2, // jne page
            0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
            0xB0, b'o', 0xEE, 0xB0, b'k', 0xEE, 0xB0, b'\n', 0xEE, // say "ok\n"
            0xB9, 0x20, 0x4E, 0x00, 0x00, // mov ecx, 20000
            0xFF, 0xC9, // wait: dec ecx
            0x75, 0xFC, // jne wait
            0xEB, 0xCE, // jmp again
        ]),
        Vmm::CloudHypervisor(_) => cloud_hypervisor::probe_guest::elf_around(&[
            0xBE, 0x00, 0x00, 0x00, 0x01, // again: mov esi, 0x1000000
            0xB9, 0x40, 0x00, 0x00, 0x00, // mov ecx, 64
            0xFF, 0x06, // page: inc dword [esi]
            0x81, 0xC6, 0x00, 0x10, 0x00, 0x00, // add esi, 4096
            0x49, // dec ecx
            0x75, 0xF5, // jne page
            0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
            0xB0, b'o', 0xEE, 0xB0, b'k', 0xEE, 0xB0, b'\n', 0xEE, // say "ok\n"
            0xB9, 0x20, 0x4E, 0x00, 0x00, // mov ecx, 20000
            0x49, // wait: dec ecx
            0x75, 0xFD, // jne wait
            0xEB, 0xD4, // jmp again
        ]),
    }
}

/// Finds out about the VMM.
async fn probe(vmm: &Vmm, dir: &Path) -> Result<Arc<dyn Driver>> {
    let (run_dir, kernels) = (dir.join("probe"), dir.join("kernels"));
    Ok(match vmm {
        Vmm::Firecracker(program) => {
            let probe = firecracker::probe::Probe {
                program,
                jailer: None,
                run_dir: &run_dir,
                kernels,
                patience: PATIENCE,
            };
            Arc::new(probe.run().await.context("Probing Firecracker")?)
        }
        Vmm::CloudHypervisor(program) => {
            let probe = cloud_hypervisor::probe::Probe {
                program,
                run_dir: &run_dir,
                kernels,
                patience: PATIENCE,
                users: Ok(Users::new(FIRST_USER)),
            };
            let driver = probe.run().await.context("Probing Cloud Hypervisor")?;
            ensure!(
                driver.paging() == Paging::Requested,
                "It asks for no pages: {}",
                driver.info().reason
            );
            Arc::new(driver)
        }
    })
}

/// What is restored, and where.
struct Stage {
    runtime: Runtime,
    driver: Arc<dyn Driver>,
    ready: ReadyVmms,
    shape: GuestShape,
    place: Place,
    slots: Slots,
    state: Vec<u8>,
    serving: Serving,
}

/// What is read off a restore.
type Measure = (&'static str, fn(&Took) -> Duration);

const MEASURES: [Measure; 3] = [
    ("until it runs", |took| took.running),
    ("our own part", |took| took.own),
    ("until its first word", |took| took.answered),
];

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &config::Restore) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "Network namespaces and VMMs need root"
    );
    let dir = tempfile::Builder::new()
        .prefix("bench-restore-")
        .tempdir_in(in_memory())?;
    launch::prepare_host()?;
    let stage = RefCell::new(Stage::set(config, dir.path())?);
    let seen: RefCell<Vec<(Way, Vec<Took>)>> = RefCell::default();
    let (stage_of_all, seen_of_all) = (&stage, &seen);
    let ways = &Way::ALL;
    let passes = ways.iter().map(|&way| {
        let once = move || {
            let took = stage_of_all.borrow_mut().restore(way, config)?;
            let typical = percentile_ms(&took, MEASURES[0].1, 0.5);
            seen_of_all.borrow_mut().push((way, took));
            Ok(typical)
        };
        (
            way.name().to_owned(),
            Box::new(once) as Box<dyn FnMut() -> Result<f64>>,
        )
    });
    interleaved(config.rounds, passes.collect())?;
    // The first round doesn't count.
    let seen = seen.into_inner().split_off(ways.len());
    let stage = stage.into_inner();
    let info = stage.driver.info();
    let report = PartsReport {
        bench: "restore",
        host: Host::describe(dir.path())?,
        setup: Setup {
            rounds: config.rounds,
            restores: config.restores,
            vmm: format!("{} {}", info.name, info.version),
            memory_mb: MEMORY_MB,
            page_bytes: stage.shape.memory().page_size.bytes(),
            latencies_us: of_all_rounds(ways, &seen)?,
        },
        parts: parts(ways, &seen),
    };
    stage.clear()?;
    report::publish(&report, config.json.as_deref())
}

/// Where sockets and device states lie: in memory, as a host's `/run` does.
fn in_memory() -> &'static Path {
    let is_tmpfs = |path: &Path| {
        let found = nix::sys::statfs::statfs(path);
        found.is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC)
    };
    let (run, memory) = (Path::new("/run"), Path::new("/dev/shm"));
    if !is_tmpfs(run) && is_tmpfs(memory) {
        memory
    } else {
        run
    }
}

fn of_all_rounds(ways: &[Way], seen: &[(Way, Vec<Took>)]) -> Result<Vec<(String, Percentiles)>> {
    let mut all = Vec::new();
    for &way in ways {
        for (name, measure) in MEASURES {
            let mut latencies = Latencies::new();
            for (_, took) in seen.iter().filter(|(of, _)| *of == way) {
                let ns = took.iter().map(|took| measure(took).as_nanos());
                let ns: Vec<u32> = ns.map(|ns| u32::try_from(ns).unwrap_or(u32::MAX)).collect();
                latencies.add(&Latencies::of(&ns))?;
            }
            // A script has no part that is ours.
            if way.is_ours() || name != MEASURES[1].0 {
                all.push((format!("{}, {name}", way.name()), latencies.percentiles()));
            }
        }
    }
    Ok(all)
}

fn parts(ways: &[Way], seen: &[(Way, Vec<Took>)]) -> Vec<Part> {
    let by_round = |way: Way, measure: Measure, at: f64| -> Vec<f64> {
        let rounds = seen.iter().filter(|(of, _)| *of == way);
        rounds
            .map(|(_, took)| percentile_ms(took, measure.1, at))
            .collect()
    };
    let compared = |about, measure: Measure| {
        let samples = ways.iter();
        let samples = samples.map(|&way| (way.name().to_owned(), by_round(way, measure, 0.5)));
        Part::new(measure.0, about, "ms", samples.collect())
            .ratio(Way::Driver.name(), Way::Script.name())
            .ratio_goal(Bound::AtMost(1.1))
            .ratio(Way::DriverWaiting.name(), Way::ScriptWaiting.name())
            .ratio_goal(Bound::AtMost(1.1))
            .ratio(Way::DriverWaiting.name(), Way::Driver.name())
    };
    let own = |name: &str, way: Way, at: f64| {
        let samples = by_round(way, MEASURES[1], at);
        (name.to_owned(), samples)
    };
    let about = "what the VMM was not waited for";
    let waiting = vec![
        own("with a process waiting, p50", Way::DriverWaiting, 0.5),
        own("the same, p99", Way::DriverWaiting, 0.99),
    ];
    let own = Part::new(MEASURES[1].0, about, "ms", waiting)
        .goal("with a process waiting, p50", Bound::AtMost(1.0))
        .goal("the same, p99", Bound::AtMost(3.0));
    vec![
        compared(
            "p50, from the request to the VMM's word that the guest runs",
            MEASURES[0],
        ),
        own,
        compared(
            "p50, from the request to what the guest says on its serial port",
            MEASURES[2],
        ),
    ]
}

fn percentile_ms(took: &[Took], measure: fn(&Took) -> Duration, at: f64) -> f64 {
    let mut sorted: Vec<f64> = took
        .iter()
        .map(|took| measure(took).as_secs_f64() * 1e3)
        .collect();
    sorted.sort_by(f64::total_cmp);
    let index = ((sorted.len() as f64 * at).ceil() as usize).clamp(1, sorted.len());
    sorted[index - 1]
}

impl Stage {
    /// Boots the guest, makes a build of it, and starts an engine that serves it.
    fn set(config: &config::Restore, dir: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let driver = runtime.block_on(probe(&config.vmm, dir))?;
        let egress = Egress {
            internet: false,
            closed: Vec::new(),
            resolver: None,
        };
        let slots = Slots::start("brest", "10.234.0.0/24".parse()?, egress)?;
        for index in [OWN_SLOT, POOLED_SLOT] {
            runtime.block_on(slots.take_down(index))?;
        }
        let slot = runtime.block_on(slots.take(OWN_SLOT, NetworkPolicy::default()))?;
        let file = |name: &str, bytes: &[u8]| -> Result<std::path::PathBuf> {
            let path = dir.join(name);
            fs::write(&path, bytes)?;
            Ok(path)
        };
        let shape = GuestShape {
            vcpus: 1,
            memory_mb: MEMORY_MB,
            huge_pages: config.huge_pages,
            kernel: file("kernel", &guest(&config.vmm))?,
            initrd: file("initrd", b"none")?,
            cmdline: String::new(),
        };
        let place = Place {
            name: "bench".into(),
            template: "bench".into(),
            slot: 0,
            run_dir: dir.join("run"),
            namespace: slot.namespace,
            disk: file("disk", &vec![0; 1 << 20])?,
            disk_limits: DiskLimits::default(),
            cgroup: None,
        };
        let store = BuildStore::open_or_create(&dir.join("builds"))?;
        let build = BuildId::from_bytes([9; 16]);
        let (pages, page_size) = (shape.memory().pages(), shape.memory().page_size);
        let state = runtime.block_on(async {
            let mut machine = driver.boot(&shape, &place).await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
            machine.stop().await?;
            let saved = machine.save(None).await?;
            let mut staging = store.stage(build)?;
            let mut writer = staging.memory_writer(None, page_size, pages)?;
            let capture = Capture {
                memory: &saved.memory,
                pages,
                page_bytes: page_size.bytes(),
                states: None,
                unwritten: None,
                check: None,
            };
            capture.write(&mut writer)?;
            writer.finish()?;
            fs::write(staging.file_path("vmstate"), &saved.state)?;
            staging.add_file("vmstate")?;
            staging.publish(PublishInfo::default())?;
            machine.kill().await;
            Ok::<_, anyhow::Error>(saved.state)
        })?;
        let cpu = placement::allowed()?.first().copied().unwrap_or(0);
        let serving = Serving::start(dir, store.root(), build, pages, cpu)?;
        slots.keep_ready(1, [OWN_SLOT]);
        let ready = ReadyVmms::start(
            (driver.clone(), None),
            slots.clone(),
            dir,
            1,
            Counts::default(),
        )?;
        Ok(Self {
            runtime,
            driver,
            ready,
            shape,
            place,
            slots,
            state,
            serving,
        })
    }

    /// Nothing of it stays on the host.
    fn clear(self) -> Result<()> {
        self.ready.end();
        self.runtime.block_on(async {
            self.slots.take_down(OWN_SLOT).await?;
            self.slots.take_down(POOLED_SLOT).await?;
            self.slots.end().await?;
            Ok(())
        })
    }
}
