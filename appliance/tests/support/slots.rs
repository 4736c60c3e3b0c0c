//! Slots on a test's own host (see [`super::net`]), asked for from there.

use appliance::network::{Egress, Slot, SlotIndex, Slots, namespace, nftables, slots};
use http_api::wire::NetworkPolicy;

use super::net::{Net, OUTSIDE, PATIENCE};
use super::wait_for;

/// The addresses of their sandboxes.
const ADDRESSES: &str = "10.231.7.0/24";

/// All slots of one instance.
pub(crate) struct Pool<'a> {
    host: &'a Net,
    pub(crate) slots: Slots,
    /// Those that its end takes down.
    pub(crate) built: Vec<Slot>,
}

impl<'a> Pool<'a> {
    /// One in which the first so many slots are in use, with the policy of those that want none.
    pub(crate) fn build(host: &'a Net, instance: &'static str, egress: Egress, count: u32) -> Self {
        let mut pool = Self::start(host, instance, ADDRESSES, egress);
        // A killed run's.
        for index in slots::existing(instance).unwrap() {
            pool.take_down(index);
        }
        let built = (0..count).map(|index| pool.take(index, NetworkPolicy::default()));
        pool.built = built.collect();
        pool
    }

    /// One that knows nothing of what an earlier one has built.
    pub(crate) fn follow(host: &'a Net, instance: &'static str, egress: Egress) -> Self {
        Self::start(host, instance, ADDRESSES, egress)
    }

    pub(crate) fn start(
        host: &'a Net,
        instance: &'static str,
        addresses: &'static str,
        egress: Egress,
    ) -> Self {
        let start = move || Slots::start(instance, addresses.parse().unwrap(), egress).unwrap();
        Self {
            host,
            slots: host.run(start),
            built: Vec::new(),
        }
    }

    /// Runs on the host, for what slots are asked.
    pub(crate) fn ask<F>(&self, act: impl FnOnce(Slots) -> F + Send + 'static) -> F::Output
    where
        F: Future<Output: Send + 'static>,
    {
        let slots = self.slots.clone();
        self.host.block_on(move || act(slots))
    }

    pub(crate) fn take(&self, index: u32, policy: NetworkPolicy) -> Slot {
        self.ask(move |slots| async move { slots.take(SlotIndex(index), policy).await.unwrap() })
    }

    /// A sandbox is paused: its slot is kept for it.
    pub(crate) fn give_back(&self, index: u32) {
        self.ask(move |slots| async move { slots.give_back(SlotIndex(index)).await.unwrap() });
    }

    /// A sandbox is gone: its slot is anybody's.
    pub(crate) fn release(&self, index: u32) {
        self.give_back(index);
        self.slots.release(SlotIndex(index));
    }

    pub(crate) fn take_down(&self, index: SlotIndex) {
        self.ask(move |slots| async move { slots.take_down(index).await.unwrap() });
    }

    /// Replaces the policy of a slot.
    pub(crate) fn set_policy(&self, slot: &Slot, policy: NetworkPolicy) {
        let index = slot.index;
        self.ask(move |slots| async move { slots.set_policy(index, policy).await.unwrap() });
    }

    /// What a slot is when it is built.
    pub(crate) fn slot(&self, index: u32) -> Slot {
        Slot {
            index: SlotIndex(index),
            namespace: namespace::path(&format!("{}-{index}", self.slots.instance())),
            address: self.slots.pool().sandbox_end(SlotIndex(index)),
        }
    }

    /// The slots that are built, as their namespaces say.
    pub(crate) fn indexes(&self) -> Vec<u32> {
        built_slots(self.slots.instance())
    }

    pub(crate) fn wait_for_slots(&self, expected: &[u32]) {
        let what = format!("slots {expected:?} of {}", self.slots.instance());
        wait_for(&what, 50 * PATIENCE, || {
            (self.indexes() == expected).then_some(())
        });
    }

    /// Waits until these are the slots that wait, complete. A slot that is being built is among
    /// [`Pool::indexes`] as soon as its namespace has a name.
    pub(crate) fn wait_until_ready(&self, expected: &[u32]) {
        wait_for(&format!("ready slots {expected:?}"), 50 * PATIENCE, || {
            let waiting = self.slots.waiting(usize::MAX);
            let waiting = waiting.iter().map(|slot| slot.index.0);
            waiting.eq(expected.iter().copied()).then_some(())
        });
    }

    /// Takes down what was built, and all that slots have in common; nothing else is there.
    pub(crate) fn end(self) {
        for slot in &self.built {
            self.take_down(slot.index);
        }
        self.ask(|slots| async move {
            slots.end().await.unwrap();
            assert_eq!(nftables::tables().unwrap(), Vec::<String>::new());
        });
    }
}

/// The slots of an instance that are built, as its namespaces say.
pub(crate) fn built_slots(instance: &str) -> Vec<u32> {
    let mut slots = slots::existing(instance).unwrap();
    slots.sort_unstable();
    slots.into_iter().map(|slot| slot.0).collect()
}

/// What reaches the outside, if anything, and not what lies behind it.
pub(crate) fn egress(internet: bool) -> Egress {
    Egress {
        internet,
        closed: vec![
            "10.0.0.0/8".parse().unwrap(),
            "169.254.0.0/16".parse().unwrap(),
        ],
        resolver: Some(OUTSIDE),
    }
}
