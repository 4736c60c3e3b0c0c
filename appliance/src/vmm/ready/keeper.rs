//! The thread that starts VMMs where none waits, and ends those that nobody wants any more.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::select_all;

use super::Inner;
use super::plan::{self, Step};
use super::waiting::{Waiting, end, has_ended, identity};
use crate::host::remove_dir;
use crate::network::{Slot, SlotIndex, Slots};
use crate::vmm::cgroup::Cgroup;
use crate::vmm::prepared::Berth;
use crate::vmm::process;

/// After one could not be started or died; doubled each time, up to a hundred times as long.
const PAUSE: Duration = Duration::from_millis(100);

/// What the thread has.
pub(super) struct Keeper {
    pub(super) inner: Arc<Inner>,
    pub(super) slots: Slots,
    pub(super) number: u64,
}

impl Keeper {
    pub(super) async fn run(mut self) {
        let mut failures = 0u32;
        while !self.inner.closing.load(Ordering::Acquire) {
            if self.remove_ended() {
                failures = failures.saturating_add(1);
            }
            if failures > 0 {
                // Whatever it is may last: no memory, a program that is being replaced.
                let pause = PAUSE * (1 << (failures - 1).min(6));
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.inner.closed.notified() => continue,
                }
            }
            let wanted = self.slots.waiting(self.inner.limit);
            let have: Vec<SlotIndex> = self.inner.waiting.lock().keys().copied().collect();
            // Whoever has taken a slot is about to claim its VMM, or to dismiss it.
            let in_use = |index: &SlotIndex| self.slots.is_in_use(*index);
            let have: Vec<SlotIndex> = have.into_iter().filter(|index| !in_use(index)).collect();
            let indexes: Vec<SlotIndex> = wanted.iter().map(|slot| slot.index).collect();
            match plan::next(&indexes, &have) {
                None => {
                    failures = 0;
                    self.something_changes().await;
                }
                Some(Step::End(index)) => {
                    let surplus = self.inner.waiting.lock().remove(&index);
                    surplus.into_iter().for_each(end);
                }
                Some(Step::Start(index)) => {
                    let slot = wanted.iter().find(|slot| slot.index == index);
                    let slot = slot.expect("it is one of the wanted");
                    match self.start(slot).await {
                        Ok(()) => failures = 0,
                        Err(reason) => {
                            failures = failures.saturating_add(1);
                            tracing::warn!(slot = index.0, reason, failures, "No VMM ahead");
                        }
                    }
                }
            }
        }
    }

    /// Starts one.
    async fn start(&mut self, slot: &Slot) -> Result<(), String> {
        self.number += 1;
        let dir = self.inner.dir.join(self.number.to_string());
        let started = async {
            let namespace = identity(&slot.namespace).map_err(|error| error.to_string())?;
            fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
            // No sandbox has a dot in its name.
            let group = format!("ready.{}", self.number);
            let cgroup = self.inner.cgroups.as_ref().map(|all| all.make(&group));
            let berth = Berth {
                slot: slot.index.0,
                run_dir: dir.clone(),
                namespace: slot.namespace.clone(),
                cgroup: cgroup.transpose().map_err(|error| error.to_string())?,
            };
            let prepares = self.inner.driver.prepares();
            let prepares = prepares.expect("there is no thread for a driver whose don't wait");
            let prepared = prepares.prepare(&berth).await;
            if prepared.is_err() {
                berth.cgroup.iter().for_each(Cgroup::remove);
            }
            Ok(Waiting {
                prepared: prepared.map_err(|error| uffd_engine::chain(&error))?,
                cgroup: berth.cgroup,
                namespace,
                dir: berth.run_dir,
            })
        };
        match started.await {
            Ok(waiting) => {
                self.inner.waiting.lock().insert(slot.index, waiting);
                // Whoever took the slot before has looked for it, and goes on without; whoever takes
                // it from now on finds it.
                if self.slots.is_in_use(slot.index) {
                    let late = self.inner.waiting.lock().remove(&slot.index);
                    late.into_iter().for_each(end);
                }
                Ok(())
            }
            Err(reason) => {
                remove_dir(&dir);
                Err(reason)
            }
        }
    }

    /// Takes out those that have died; whether there were any.
    fn remove_ended(&self) -> bool {
        let ended: Vec<(SlotIndex, Waiting)> = {
            let mut waiting = self.inner.waiting.lock();
            let ended = waiting.extract_if(.., |_, one| has_ended(one.prepared.pidfd()));
            ended.collect()
        };
        let any = !ended.is_empty();
        for (slot, waiting) in ended {
            tracing::warn!(slot = slot.0, "A waiting VMM has ended");
            self.inner.counts.lost.inc();
            end(waiting);
        }
        any
    }

    /// Waits until a slot is built or taken, a VMM ends, or all is over.
    async fn something_changes(&self) {
        let pidfds: Vec<_> = {
            let waiting = self.inner.waiting.lock();
            let pidfds = waiting.values().map(|one| one.prepared.pidfd());
            pidfds
                .filter_map(|fd| fd.try_clone_to_owned().ok())
                .collect()
        };
        let any_ends = async {
            if pidfds.is_empty() {
                return std::future::pending().await;
            }
            let ends = pidfds.iter().map(|pidfd| {
                use std::os::fd::AsFd;
                Box::pin(process::ended(pidfd.as_fd()))
            });
            select_all(ends).await;
        };
        tokio::select! {
            () = self.slots.changed() => {}
            () = self.inner.closed.notified() => {}
            () = any_ends => {}
        }
    }
}
