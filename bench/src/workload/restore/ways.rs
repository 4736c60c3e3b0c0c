//! The ways to bring the guest back, and what each restore took.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use appliance::vmm::{Machine, PageRequests, Paging, Place, Restore, VmmError};
use http_api::wire::NetworkPolicy;
use tokio::sync::oneshot;

use super::bare::{Bare, Calls};
use super::guest::{Guest, ask};
use super::serving::Serving;
use super::stage::Stage;
use super::{PATIENCE, POOLED_SLOT};
use crate::config::{self, Vmm};

/// What one restore took, from the request on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Took {
    /// Until the VMM said that the guest runs.
    pub(super) running: Duration,
    /// Of that, what the VMM was not waited for.
    pub(super) own: Duration,
    /// Until the guest's first word, or envd's first answer.
    pub(super) answered: Duration,
}

/// A way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The driver claims a process that waits.
    DriverWaiting,
    /// The script has started one.
    ScriptWaiting,
    /// The driver starts one.
    Driver,
    /// The script starts one.
    Script,
}

impl Way {
    pub(super) const ALL: [Self; 4] = [
        Self::DriverWaiting,
        Self::ScriptWaiting,
        Self::Driver,
        Self::Script,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::DriverWaiting => "driver, waiting",
            Self::ScriptWaiting => "bare script, waiting",
            Self::Driver => "driver",
            Self::Script => "bare script",
        }
    }

    pub(super) const fn is_ours(self) -> bool {
        matches!(self, Self::DriverWaiting | Self::Driver)
    }

    pub(super) const fn waits(self) -> bool {
        matches!(self, Self::DriverWaiting | Self::ScriptWaiting)
    }
}

impl Stage {
    pub(super) fn restore(&mut self, way: Way, config: &config::Restore) -> Result<Vec<Took>> {
        match way {
            Way::DriverWaiting => (0..config.restores).map(|_| self.claimed()).collect(),
            Way::Driver => (0..config.restores).map(|_| self.started()).collect(),
            Way::ScriptWaiting => self.by_script(config, true),
            Way::Script => self.by_script(config, false),
        }
    }

    fn started(&mut self) -> Result<Took> {
        let Self {
            runtime,
            driver,
            guest,
            place,
            address,
            state,
            serving,
            ..
        } = self;
        guest.lay_disk(&place.disk)?;
        let (machine, took) = runtime.block_on(async {
            let started = Instant::now();
            let handoff = driver.handoff(place)?;
            let requested = driver.paging() == Paging::Requested;
            let restore = |asks| {
                let restore = at_once(state, &handoff, asks);
                driver.restore(&guest.shape, place, restore)
            };
            let machine = served(serving, requested, &handoff, restore).await?;
            observed(machine, guest, *address, started).await
        })?;
        self.end(machine)?;
        Ok(took)
    }

    fn claimed(&mut self) -> Result<Took> {
        self.wait_for_processes()?;
        let Self {
            runtime,
            driver,
            ready,
            guest,
            place,
            slots,
            state,
            serving,
            ..
        } = self;
        guest.lay_disk(&place.disk)?;
        let (machine, took) = runtime.block_on(async {
            let started = Instant::now();
            let slot = slots.take(POOLED_SLOT, NetworkPolicy::default()).await?;
            let place = Place {
                slot: POOLED_SLOT.0,
                namespace: slot.namespace.clone(),
                run_dir: place.run_dir.with_file_name("claimed"),
                ..place.clone()
            };
            fs::create_dir_all(&place.run_dir)?;
            let claimed = ready.claim(&slot, driver, &place.run_dir);
            let claimed = claimed.context("No VMM waits")?;
            let handoff = driver.handoff(&place)?;
            let requested = driver.paging() == Paging::Requested;
            let restore = |asks| {
                let restore = at_once(state, &handoff, asks);
                claimed.prepared.restore(&guest.shape, &place, restore)
            };
            let machine = served(serving, requested, &handoff, restore).await?;
            let observed = observed(machine, guest, slot.address, started).await?;
            fs::remove_dir_all(&place.run_dir)?;
            anyhow::Ok(observed)
        })?;
        self.end(machine)?;
        self.runtime.block_on(self.slots.give_back(POOLED_SLOT))?;
        Ok(took)
    }

    fn end(&mut self, mut machine: Box<dyn Machine>) -> Result<()> {
        self.serving.attached()?;
        self.runtime.block_on(machine.kill());
        self.serving.detach()
    }

    /// One in the slot that is given back, after the first time, and one in the next free one.
    fn wait_for_processes(&self) -> Result<()> {
        let began = Instant::now();
        let here = |slot: &appliance::network::Slot| slot.index == POOLED_SLOT;
        loop {
            let waiting = self.slots.waiting(1);
            if waiting.iter().any(here) && self.ready.depth() == waiting.len() {
                break;
            }
            ensure!(began.elapsed() < PATIENCE, "No VMM waits");
            std::thread::sleep(Duration::from_millis(1));
        }
        // What was being started has started.
        std::thread::sleep(Duration::from_millis(5));
        Ok(())
    }

    /// On a thread of its own, whose namespaces end with it.
    fn by_script(&mut self, config: &config::Restore, waiting: bool) -> Result<Vec<Took>> {
        let (Vmm::Firecracker(program) | Vmm::CloudHypervisor(program) | Vmm::Qemu { program, .. }) =
            &config.vmm;
        // A guest is reached from the host, in whose namespace the script's thread no longer is.
        let (questions, asked) = mpsc::channel();
        let (answered, answers) = mpsc::channel();
        let address = self.address;
        let asking = move || {
            while asked.recv().is_ok() && answered.send(ask(address)).is_ok() {}
        };
        let script = move || {
            let place = &self.place;
            let dir = place.run_dir.with_file_name("bare");
            let bare = Bare::on_this_thread(program, &dir, &place.namespace, &place.disk)?;
            let mut all = Vec::new();
            for _ in 0..config.restores {
                self.guest.lay_disk(&place.disk)?;
                let ahead = if waiting {
                    bare.ahead(&self.calls)?
                } else {
                    None
                };
                let started = Instant::now();
                if !matches!(self.calls, Calls::CloudHypervisor) {
                    self.serving.expect(&bare.handoff())?;
                }
                let (state, shape, serving) = (&self.state, &self.guest.shape, &mut self.serving);
                let mut process = match &self.calls {
                    Calls::Firecracker => {
                        let mut process = ahead.map_or_else(|| bare.start(), Ok)?;
                        bare.load(&mut process, state)?;
                        process
                    }
                    Calls::CloudHypervisor => {
                        let mut process = ahead.map_or_else(|| bare.start_receiver(), Ok)?;
                        let size = shape.memory();
                        bare.give(&mut process, state, size, |asks| serving.answer(asks))?;
                        process
                    }
                    Calls::Qemu(qemu) => bare.bring_back(qemu, shape, place, state)?,
                };
                let running = started.elapsed();
                if self.guest.is_linux() {
                    questions.send(())?;
                    answers.recv()??;
                } else {
                    process.answer()?;
                }
                all.push(Took {
                    running,
                    own: Duration::ZERO,
                    answered: started.elapsed(),
                });
                self.serving.attached()?;
                drop(process);
                self.serving.detach()?;
            }
            Ok(all)
        };
        let ended = std::thread::scope(|scope| {
            scope.spawn(asking);
            scope.spawn(script).join()
        });
        ended.unwrap_or_else(|_| Err(anyhow!("The script's thread panicked")))
    }
}

/// A restore after which the guest runs.
fn at_once<'a>(
    state: &[u8],
    handoff: &'a Path,
    asks: oneshot::Sender<PageRequests>,
) -> Restore<'a> {
    Restore {
        had_disk_limits: false,
        state: state.to_vec(),
        handoff,
        run: true,
        asks: Some(asks),
    }
}

/// What a restore gives whose guest's memory is served, as it is handed over or asked for.
async fn served<F>(
    serving: &mut Serving,
    requested: bool,
    handoff: &Path,
    restore: impl FnOnce(oneshot::Sender<PageRequests>) -> F,
) -> Result<Box<dyn Machine>>
where
    F: Future<Output = Result<Box<dyn Machine>, VmmError>>,
{
    if !requested {
        serving.expect(handoff)?;
    }
    let (asks, asked) = oneshot::channel();
    let restoring = async { restore(asks).await.map_err(anyhow::Error::from) };
    let answering = async {
        match asked.await {
            Ok(asks) if requested => serving.answer(&asks),
            // Whoever restores says why.
            _ => Ok(()),
        }
    };
    let (machine, ()) = tokio::try_join!(restoring, answering)?;
    Ok(machine)
}

/// What it took until now, and what it takes until the guest has said something.
async fn observed(
    machine: Box<dyn Machine>,
    guest: &Guest,
    address: Ipv4Addr,
    started: Instant,
) -> Result<(Box<dyn Machine>, Took)> {
    let running = started.elapsed();
    let own = running.saturating_sub(machine.vmm_time());
    guest.answered(machine.as_ref(), address).await?;
    let took = Took {
        running,
        own,
        answered: started.elapsed(),
    };
    Ok((machine, took))
}
