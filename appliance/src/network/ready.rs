//! Which slots wait, built, for a sandbox: decisions only, no netlink.
//!
//! ```text
//!            build ahead                 take                    give back
//!  free index ─────────▶ built and free ─────▶ in use by a sandbox ─────▶ built, kept for it
//!                              ▲                                              │ delete
//!                              └──────────────────────────────────────────────┘
//! ```
//!
//! A sandbox has its index for its whole life, paused or not, so a slot that it gave back is
//! kept for its resume; the ones that were given back longest ago go when there are too many.
//! New sandboxes get the lowest free index, so those are built ahead.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tokio::sync::Notify;

use super::address::SlotIndex;
use super::slot::Slot;

/// Slots that wait, built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// For new sandboxes.
    pub free: usize,
    /// For the paused ones that gave them back.
    pub kept: usize,
}

/// The waiting slots of an instance.
#[derive(Debug)]
pub(super) struct Ready {
    /// How many slots of the host's range there are.
    size: u32,
    /// How many free ones should wait, and how many that sandboxes gave back may.
    limit: usize,
    built: BTreeMap<SlotIndex, Slot>,
    /// Indexes that belong to sandboxes.
    owned: BTreeSet<SlotIndex>,
    /// Those of `built` that sandboxes gave back, the oldest first.
    kept: VecDeque<SlotIndex>,
    /// Those that were taken, and not put back since.
    in_use: BTreeSet<SlotIndex>,
    /// Told when others wait than before.
    changed: Arc<Notify>,
}

impl Ready {
    /// Nothing waits, and nothing should, before [`Ready::open`].
    pub(super) fn new(size: u32) -> Self {
        Self {
            size,
            limit: 0,
            built: BTreeMap::new(),
            owned: BTreeSet::new(),
            kept: VecDeque::new(),
            in_use: BTreeSet::new(),
            changed: Arc::default(),
        }
    }

    /// Tells one listener that others wait than before.
    pub(super) fn changed(&self) -> Arc<Notify> {
        self.changed.clone()
    }

    /// Whether a sandbox has taken it.
    pub(super) fn is_in_use(&self, index: SlotIndex) -> bool {
        self.in_use.contains(&index)
    }

    /// Those that wait: so many of the free ones, the next to be taken first, then as many of the
    /// kept ones, the newest first.
    pub(super) fn waiting(&self, limit: usize) -> Vec<Slot> {
        let free = self.built.values();
        let free = free
            .filter(|slot| !self.owned.contains(&slot.index))
            .take(limit);
        let kept = self.kept.iter().rev().take(limit);
        free.chain(kept.filter_map(|index| self.built.get(index)))
            .cloned()
            .collect()
    }

    /// From now on slots should wait; `owned` belong to sandboxes already.
    pub(super) fn open(&mut self, limit: usize, owned: impl IntoIterator<Item = SlotIndex>) {
        self.limit = limit;
        self.owned.extend(owned);
    }

    /// A sandbox takes its slot, or has to wait until it is built.
    pub(super) fn take(&mut self, index: SlotIndex) -> Option<Slot> {
        self.owned.insert(index);
        self.in_use.insert(index);
        self.kept.retain(|kept| *kept != index);
        self.changed.notify_one();
        self.built.remove(&index)
    }

    /// A sandbox has it from an earlier daemon.
    pub(super) fn adopt(&mut self, index: SlotIndex) {
        self.owned.insert(index);
        self.in_use.insert(index);
    }

    /// A slot is built: ahead, or cleaned after it was given back.
    pub(super) fn put(&mut self, slot: Slot) {
        self.in_use.remove(&slot.index);
        if self.owned.contains(&slot.index) {
            self.kept.push_back(slot.index);
        }
        self.built.insert(slot.index, slot);
        self.changed.notify_one();
    }

    /// Its sandbox is gone, so the index is free.
    pub(super) fn release(&mut self, index: SlotIndex) {
        self.owned.remove(&index);
        self.in_use.remove(&index);
        self.changed.notify_one();
        self.kept.retain(|kept| *kept != index);
    }

    /// Takes out a slot that is one too many, to be taken down.
    pub(super) fn surplus(&mut self) -> Option<SlotIndex> {
        let index = if self.kept.len() > self.limit {
            self.kept.pop_front()
        } else if self.free() > self.limit {
            let free = |index: &&SlotIndex| !self.owned.contains(index);
            self.built.keys().rev().find(free).copied()
        } else {
            None
        }?;
        self.built.remove(&index);
        self.changed.notify_one();
        Some(index)
    }

    /// The index to be built ahead next.
    pub(super) fn wanted(&self) -> Option<SlotIndex> {
        if self.free() >= self.limit {
            return None;
        }
        let idle =
            |index: &SlotIndex| !self.owned.contains(index) && !self.built.contains_key(index);
        (0..self.size).map(SlotIndex).find(idle)
    }

    /// How many wait: for anybody, and for the paused sandboxes that gave them back.
    pub(super) fn depth(&self) -> Depth {
        Depth {
            free: self.free(),
            kept: self.kept.len(),
        }
    }

    /// Whether a slot waits, or belongs to a sandbox.
    pub(super) fn has(&self, index: SlotIndex) -> bool {
        self.built.contains_key(&index) || self.owned.contains(&index)
    }

    /// Whether slots that are given back may wait at all.
    pub(super) fn keeps(&self) -> bool {
        self.limit > 0
    }

    /// Takes out everything, to be taken down; from now on nothing should wait.
    pub(super) fn close(&mut self) -> Vec<SlotIndex> {
        self.limit = 0;
        self.kept.clear();
        std::mem::take(&mut self.built).into_keys().collect()
    }

    fn free(&self) -> usize {
        self.built.len() - self.kept.len()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn slot(index: u32) -> Slot {
        Slot {
            index: SlotIndex(index),
            namespace: "/nowhere".into(),
            address: Ipv4Addr::LOCALHOST,
        }
    }

    /// Builds ahead until nothing is wanted.
    fn fill(ready: &mut Ready) -> Vec<u32> {
        let mut built = Vec::new();
        while let Some(index) = ready.wanted() {
            ready.put(slot(index.0));
            built.push(index.0);
        }
        built
    }

    #[test]
    fn lowest_free_indexes_are_built_ahead() {
        let mut ready = Ready::new(10);
        assert!(fill(&mut ready).is_empty(), "nothing before it is open");
        ready.open(3, [SlotIndex(0), SlotIndex(2)]);
        assert_eq!(fill(&mut ready), [1, 3, 4]);
        assert!(!ready.is_in_use(SlotIndex(1)));
        assert_eq!(ready.take(SlotIndex(1)), Some(slot(1)));
        assert_eq!(ready.take(SlotIndex(1)), None, "it is in use");
        assert!(ready.is_in_use(SlotIndex(1)));
        assert_eq!(fill(&mut ready), [5]);
        assert_eq!(ready.surplus(), None);
    }

    #[test]
    fn full_range_is_no_reason_to_go_on() {
        let mut ready = Ready::new(2);
        ready.open(3, [SlotIndex(0)]);
        assert_eq!(fill(&mut ready), [1]);
    }

    #[test]
    fn slot_of_a_paused_sandbox_is_kept_for_it_until_there_are_too_many() {
        let mut ready = Ready::new(10);
        ready.open(2, []);
        for index in 0..3 {
            assert_eq!(ready.take(SlotIndex(index)), None);
            ready.put(slot(index));
        }
        assert_eq!(ready.surplus(), Some(SlotIndex(0)), "the oldest");
        assert_eq!(ready.surplus(), None);
        // Nobody else gets them.
        assert_eq!(fill(&mut ready), [3, 4]);
        let waiting = |limit| -> Vec<u32> {
            let waiting = ready.waiting(limit);
            waiting.iter().map(|slot| slot.index.0).collect()
        };
        assert_eq!(waiting(9), [3, 4, 2, 1]);
        assert_eq!(waiting(1), [3, 2]);
        assert_eq!(ready.take(SlotIndex(2)), Some(slot(2)));
        assert_eq!(ready.take(SlotIndex(0)), None);
    }

    #[test]
    fn slot_of_a_deleted_sandbox_is_free_again() {
        let mut ready = Ready::new(10);
        ready.open(1, []);
        assert_eq!(fill(&mut ready), [0]);
        assert_eq!(ready.take(SlotIndex(0)), Some(slot(0)));
        assert_eq!(fill(&mut ready), [1]);
        ready.put(slot(0));
        ready.release(SlotIndex(0));
        assert_eq!(ready.surplus(), Some(SlotIndex(1)), "the highest");
        assert_eq!(ready.take(SlotIndex(0)), Some(slot(0)));
        assert!(ready.close().is_empty());
    }

    #[test]
    fn closing_gives_everything_back() {
        let mut ready = Ready::new(10);
        ready.open(2, [SlotIndex(5)]);
        fill(&mut ready);
        ready.put(slot(5));
        assert_eq!(ready.close(), [SlotIndex(0), SlotIndex(1), SlotIndex(5)]);
        assert_eq!(ready.wanted(), None);
        assert_eq!(ready.surplus(), None);
    }
}
