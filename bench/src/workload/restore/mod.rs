//! A restore by the driver, from the request until the VMM has let the guest run, beside the same
//! VMM driven by a bare script of the same calls.
//!
//! The guest is a few instructions that touch a few pages: what is measured is everything around
//! it. Closed loop, one restore at a time; the build is in the page cache, and one engine serves
//! both ways.

mod bare;
mod bare_cloud;
mod serving;

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use appliance::network::{Egress, SlotIndex, Slots};
use appliance::vmm::{
    Driver, GuestShape, Paging, Place, Restore, cloud_hypervisor, firecracker, launch,
};
use http_api::wire::NetworkPolicy;
use serde::Serialize;
use snapshot_format::{BuildId, BuildStore, PageCount, PageSize, PublishInfo};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use uffd_engine::dirty::Capture;

use self::bare::{Bare, Took};
use self::serving::Serving;
use crate::config::{self, Vmm};
use crate::host::Host;
use crate::placement;
use crate::report;
use crate::report::parts::{Bound, Part, PartsReport};
use crate::workload::rounds::interleaved;

const MEMORY_MB: u32 = 64;
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a restored guest runs: long enough to fault, which shows that it does.
const SOME_FAULTS: Duration = Duration::from_millis(5);

/// What was the same for all parts.
#[derive(Clone, Debug, Serialize)]
struct Setup {
    rounds: u32,
    restores: u32,
    vmm: String,
    memory_mb: u32,
}

impl Display for Setup {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "setup    {}, {} MiB; {} restores per round and way, medians of {} rounds after one not \
             counted, then the range",
            self.vmm, self.memory_mb, self.restores, self.rounds
        )
    }
}

/// Touches 64 pages, over and over; in 64-bit mode for the one, in 32-bit mode for the other.
fn guest(vmm: &Vmm) -> Vec<u8> {
    match vmm {
        Vmm::Firecracker(_) => firecracker::probe_guest::elf_around(&[
            0x48, 0xC7, 0xC6, 0x00, 0x00, 0x00, 0x01, // again: mov rsi, 0x1000000
            0xB9, 0x40, 0x00, 0x00, 0x00, // mov ecx, 64
            0x48, 0xFF, 0x06, // page: inc qword [rsi]
            0x48, 0x81, 0xC6, 0x00, 0x10, 0x00, 0x00, // add rsi, 4096
            0xFF, 0xC9, // dec ecx
            0x75, 0xF2, // jne page
            0xEB, 0xE4, // jmp again
        ]),
        Vmm::CloudHypervisor(_) => cloud_hypervisor::probe_guest::elf_around(&[
            0xBE, 0x00, 0x00, 0x00, 0x01, // again: mov esi, 0x1000000
            0xB9, 0x40, 0x00, 0x00, 0x00, // mov ecx, 64
            0xFF, 0x06, // page: inc dword [esi]
            0x81, 0xC6, 0x00, 0x10, 0x00, 0x00, // add esi, 4096
            0x49, // dec ecx
            0x75, 0xF5, // jne page
            0xEB, 0xE9, // jmp again
        ]),
    }
}

/// Finds out about the VMM.
async fn probe(vmm: &Vmm, dir: &Path) -> Result<Box<dyn Driver>> {
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
            Box::new(probe.run().await.context("Probing Firecracker")?)
        }
        Vmm::CloudHypervisor(program) => {
            let probe = cloud_hypervisor::probe::Probe {
                program,
                run_dir: &run_dir,
                kernels,
                patience: PATIENCE,
            };
            let driver = probe.run().await.context("Probing Cloud Hypervisor")?;
            ensure!(
                driver.paging() == Paging::Requested,
                "It asks for no pages: {}",
                driver.info().reason
            );
            Box::new(driver)
        }
    })
}

/// What is restored, and where.
struct Stage {
    runtime: Runtime,
    driver: Box<dyn Driver>,
    shape: GuestShape,
    place: Place,
    slots: Slots,
    state: Vec<u8>,
    serving: Serving,
}

/// Measures, prints, and writes what was asked for.
pub(crate) fn run(config: &config::Restore) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "Network namespaces and VMMs need root"
    );
    let dir = tempfile::Builder::new()
        .prefix("bench-restore-")
        .tempdir_in("/run")?;
    launch::prepare_host()?;
    let mut stage = Stage::set(config, dir.path())?;
    let restores = config.restores;
    let (mut slowest, mut slowest_bare) = (Vec::new(), Vec::new());
    let (mut api, mut load) = (Vec::new(), Vec::new());
    let cell = std::cell::RefCell::new(&mut stage);
    let mut samples = interleaved(
        config.rounds,
        vec![
            (
                "driver, p50".into(),
                Box::new(|| {
                    let times = cell.borrow_mut().by_driver(restores)?;
                    slowest.push(percentile(&times, 0.99));
                    Ok(percentile(&times, 0.5))
                }),
            ),
            (
                "bare script, p50".into(),
                Box::new(|| {
                    let times = cell.borrow_mut().by_script(&config.vmm, restores)?;
                    let of = |part: fn(&Took) -> Duration| -> Vec<Duration> {
                        times.iter().map(part).collect()
                    };
                    let all = of(|took| took.all);
                    slowest_bare.push(percentile(&all, 0.99));
                    api.push(percentile(&of(|took| took.api), 0.5));
                    load.push(percentile(&of(|took| took.load), 0.5));
                    Ok(percentile(&all, 0.5))
                }),
            ),
        ],
    )?;
    // Of the same passes; the first round doesn't count.
    let own: Vec<f64> = samples[0]
        .1
        .iter()
        .zip(&samples[1].1)
        .map(|(ours, bare)| ours - bare)
        .collect();
    samples.extend([
        ("driver, p99".to_owned(), slowest.split_off(1)),
        ("bare script, p99".to_owned(), slowest_bare.split_off(1)),
        ("VMM: start to open API, p50".to_owned(), api.split_off(1)),
        ("VMM: load and run, p50".to_owned(), load.split_off(1)),
        ("driver over bare script, p50".to_owned(), own),
    ]);
    let about = "from the request to the VMM's word that the guest runs";
    let part = Part::new("restore", about, "ms", samples)
        .ratio("driver, p50", "bare script, p50")
        .ratio_goal(Bound::AtMost(1.1));
    let info = stage.driver.info();
    let report = PartsReport {
        bench: "restore",
        host: Host::describe(Path::new("/run"))?,
        setup: Setup {
            rounds: config.rounds,
            restores,
            vmm: format!("{} {}", info.name, info.version),
            memory_mb: MEMORY_MB,
        },
        parts: vec![part],
    };
    let (slots, runtime) = (&stage.slots, &stage.runtime);
    runtime.block_on(slots.take_down(SlotIndex(0)))?;
    runtime.block_on(slots.end())?;
    report::publish(&report, config.json.as_deref())
}

fn percentile(times: &[Duration], at: f64) -> f64 {
    let mut sorted: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
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
        let index = SlotIndex(0);
        runtime.block_on(slots.take_down(index))?;
        let slot = runtime.block_on(slots.take(index, NetworkPolicy::default()))?;
        let file = |name: &str, bytes: &[u8]| -> Result<std::path::PathBuf> {
            let path = dir.join(name);
            fs::write(&path, bytes)?;
            Ok(path)
        };
        let shape = GuestShape {
            vcpus: 1,
            memory_mb: MEMORY_MB,
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
        };
        let store = BuildStore::open_or_create(&dir.join("builds"))?;
        let build = BuildId::from_bytes([9; 16]);
        let pages = PageCount::new(shape.memory_bytes() / PageSize::Size4K.bytes());
        let state = runtime.block_on(async {
            let mut machine = driver.boot(&shape, &place).await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
            machine.stop().await?;
            let saved = machine.save(None).await?;
            let mut staging = store.stage(build)?;
            let mut writer = staging.memory_writer(None, PageSize::Size4K, pages)?;
            let capture = Capture {
                memory: &saved.memory,
                pages,
                page_bytes: PageSize::Size4K.bytes(),
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
        Ok(Self {
            runtime,
            driver,
            shape,
            place,
            slots,
            state,
            serving,
        })
    }

    fn by_driver(&mut self, restores: u32) -> Result<Vec<Duration>> {
        let mut times = Vec::new();
        for _ in 0..restores {
            let started = Instant::now();
            let handoff = self.driver.handoff(&self.place)?;
            let (asks, asked) = oneshot::channel();
            let requested = self.driver.paging() == Paging::Requested;
            if !requested {
                self.serving.expect(&handoff)?;
            }
            let restore = Restore {
                state: self.state.clone(),
                handoff: &handoff,
                run: true,
                asks: Some(asks),
            };
            let restoring = self.driver.restore(&self.shape, &self.place, restore);
            let restoring = async { restoring.await.map_err(anyhow::Error::from) };
            let serving = &mut self.serving;
            let answering = async {
                match asked.await {
                    Ok(asks) if requested => serving.answer(&asks),
                    // Whoever restores says why.
                    _ => Ok(()),
                }
            };
            let both = async { tokio::try_join!(restoring, answering) };
            let (mut machine, ()) = self.runtime.block_on(both)?;
            times.push(started.elapsed());
            self.serving.attached()?;
            std::thread::sleep(SOME_FAULTS);
            self.runtime.block_on(machine.kill());
            self.serving.detach()?;
        }
        Ok(times)
    }

    /// On a thread of its own, whose namespaces end with it.
    fn by_script(&mut self, vmm: &Vmm, restores: u32) -> Result<Vec<Took>> {
        let Self {
            place,
            state,
            serving,
            shape,
            ..
        } = self;
        let script = || {
            let dir = place.run_dir.with_file_name("bare");
            let (Vmm::Firecracker(program) | Vmm::CloudHypervisor(program)) = vmm;
            let bare = Bare::on_this_thread(program, &dir, &place.namespace, &place.disk)?;
            let mut times = Vec::new();
            for _ in 0..restores {
                let (mut child, took) = match vmm {
                    Vmm::Firecracker(_) => bare.restore(state, |at| serving.expect(at))?,
                    Vmm::CloudHypervisor(_) => {
                        let bytes = shape.memory_bytes();
                        bare.give(state, bytes, |asks| serving.answer(asks))?
                    }
                };
                times.push(took);
                serving.attached()?;
                std::thread::sleep(SOME_FAULTS);
                child.kill()?;
                child.wait()?;
                serving.detach()?;
            }
            Ok(times)
        };
        std::thread::scope(|scope| scope.spawn(script).join())
            .unwrap_or_else(|_| Err(anyhow!("The script's thread panicked")))
    }
}
