//! The thread that builds slots and takes them down, and the handle to it.
//!
//! What waits, built, is taken under a lock without the thread; it builds the next one when
//! nobody waits for it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http_api::wire::NetworkPolicy;
use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};

use super::address::{Pool, SlotIndex};
use super::ready::{Depth, Ready};
use super::rules::{self, Egress};
use super::slot::{self, Slot, SlotError};
use super::{address, namespace, nftables};
use crate::reconcile;

/// After a slot could not be built ahead; doubled each time, up to a hundred times as long.
const PAUSE: Duration = Duration::from_millis(100);

/// A slot that was nobody's, and whether it is gone.
pub type Swept = (SlotIndex, Result<(), SlotError>);

type Answer<T> = oneshot::Sender<Result<T, SlotError>>;

enum Order {
    Build(SlotIndex, NetworkPolicy, Answer<Slot>),
    SetPolicy(SlotIndex, NetworkPolicy, Answer<()>),
    Enforce(SlotIndex, NetworkPolicy, Answer<()>),
    GiveBack(SlotIndex, Answer<()>),
    TakeDown(SlotIndex, Answer<()>),
    Sweep(oneshot::Sender<Vec<Swept>>),
    /// Look at what waits.
    Look,
    End(oneshot::Sender<io::Result<()>>),
}

/// A handle to the slot thread; it ends with its last handle.
#[derive(Clone, Debug)]
pub struct Slots {
    orders: mpsc::Sender<Order>,
    ready: Arc<Mutex<Ready>>,
    pool: Pool,
    instance: Arc<str>,
}

impl Slots {
    /// Sets the host's rules for slots, and starts the thread, in the calling thread's namespace.
    ///
    /// # Errors
    /// The thread or its runtime can't be made, the kernel refuses the rules, or packets can't be
    /// forwarded.
    pub fn start(instance: &str, pool: Pool, egress: Egress) -> io::Result<Self> {
        nftables::apply(rules::host_rules(instance, pool))?;
        if egress.internet {
            // Left on at the end: others may have come to rely on it.
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        }
        let (orders, inbox) = mpsc::channel(64);
        let ready = Arc::new(Mutex::new(Ready::new(pool.slots())));
        let builder = Builder {
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?,
            instance: instance.to_owned(),
            pool,
            egress,
            ready: Arc::clone(&ready),
            special: BTreeMap::new(),
        };
        std::thread::Builder::new()
            .name("slots".into())
            .spawn(move || builder.run(inbox))?;
        Ok(Self {
            orders,
            ready,
            pool,
            instance: instance.into(),
        })
    }

    /// From now on, keeps so many free slots built, and as many that paused sandboxes gave back;
    /// `owned` belong to sandboxes. To be called when no slot of an earlier daemon is left but those that
    /// were taken over.
    pub fn keep_ready(&self, count: usize, owned: impl IntoIterator<Item = SlotIndex>) {
        self.ready.lock().open(count, owned);
        self.look();
    }

    /// How many wait, built.
    #[must_use]
    pub fn depth(&self) -> Depth {
        self.ready.lock().depth()
    }

    /// Those that wait: so many for new sandboxes, the next to be taken first, and as many that
    /// paused ones gave back.
    #[must_use]
    pub fn waiting(&self, limit: usize) -> Vec<Slot> {
        self.ready.lock().waiting(limit)
    }

    /// Whether a sandbox has taken it and not given it back.
    #[must_use]
    pub fn is_in_use(&self, index: SlotIndex) -> bool {
        self.ready.lock().is_in_use(index)
    }

    /// Waits until others wait than before. For one listener.
    pub async fn changed(&self) {
        let changed = self.ready.lock().changed();
        changed.notified().await;
    }

    /// The addresses that slots are made of.
    #[must_use]
    pub fn pool(&self) -> Pool {
        self.pool
    }

    /// Takes a sandbox's slot: the one that waits, or a new one.
    ///
    /// # Errors
    /// Which step failed; nothing of it is left.
    pub async fn take(&self, index: SlotIndex, policy: NetworkPolicy) -> Result<Slot, SlotError> {
        let waiting = self.ready.lock().take(index);
        let Some(slot) = waiting else {
            let order = |answer| Order::Build(index, policy, answer);
            return self.ask(index, order).await;
        };
        self.look();
        if policy != NetworkPolicy::default() {
            self.set_policy(index, policy).await?;
        }
        Ok(slot)
    }

    /// Takes over the slot of a sandbox that an earlier daemon built it for: nobody else gets it from
    /// now on.
    pub fn adopt(&self, index: SlotIndex) -> Slot {
        self.ready.lock().adopt(index);
        slot::describe(&self.instance, self.pool, index)
    }

    /// Puts a policy into force that may be, whatever was in force before.
    ///
    /// # Errors
    /// Which step failed.
    pub async fn enforce(&self, index: SlotIndex, policy: NetworkPolicy) -> Result<(), SlotError> {
        let order = |answer| Order::Enforce(index, policy, answer);
        self.ask(index, order).await
    }

    /// Replaces what a slot's guest may reach, as one transaction, and how fast. Connections that are
    /// established go on.
    ///
    /// # Errors
    /// Which step failed; the rules are as before.
    pub async fn set_policy(
        &self,
        index: SlotIndex,
        policy: NetworkPolicy,
    ) -> Result<(), SlotError> {
        let order = |answer| Order::SetPolicy(index, policy, answer);
        self.ask(index, order).await
    }

    /// A sandbox gives its slot back when its VMM is gone: cleaned, it may be kept for the next
    /// time. That there is none is no error.
    ///
    /// # Errors
    /// Which step of taking it down failed.
    pub async fn give_back(&self, index: SlotIndex) -> Result<(), SlotError> {
        self.ask(index, |answer| Order::GiveBack(index, answer))
            .await
    }

    /// A sandbox is gone, and its index with it.
    pub fn release(&self, index: SlotIndex) {
        self.ready.lock().release(index);
        self.look();
    }

    /// Takes a slot down, whoever built it.
    ///
    /// # Errors
    /// Which step failed.
    pub async fn take_down(&self, index: SlotIndex) -> Result<(), SlotError> {
        self.ask(index, |answer| Order::TakeDown(index, answer))
            .await
    }

    /// Takes down every slot that exists and is nobody's, with the processes in it.
    pub async fn sweep(&self) -> Vec<Swept> {
        let (reply, answer) = oneshot::channel();
        let _ = self.orders.send(Order::Sweep(reply)).await;
        answer.await.unwrap_or_default()
    }

    /// The name that all of them begin with.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Takes down what waits, removes the host's rules and ends the thread; when no sandbox has a
    /// slot.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn end(&self) -> io::Result<()> {
        let (reply, answer) = oneshot::channel();
        let sent = self.orders.send(Order::End(reply)).await;
        match (sent, answer.await) {
            (Ok(()), Ok(result)) => result,
            // It ended before.
            _ => Ok(()),
        }
    }

    async fn ask<T>(
        &self,
        index: SlotIndex,
        order: impl FnOnce(Answer<T>) -> Order,
    ) -> Result<T, SlotError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.orders.send(order(reply)).await;
        match (sent, answer.await) {
            (Ok(()), Ok(result)) => result,
            _ => Err(SlotError {
                slot: index,
                operation: "asking for it",
                source: io::Error::other("the slot thread has ended"),
            }),
        }
    }

    /// Wakes the thread. If its mailbox is full, it is awake.
    fn look(&self) {
        let _ = self.orders.try_send(Order::Look);
    }
}

/// What the thread has.
struct Builder {
    runtime: Runtime,
    instance: String,
    pool: Pool,
    egress: Egress,
    ready: Arc<Mutex<Ready>>,
    /// What is in force where it is not the default. A transaction of rules takes milliseconds.
    special: BTreeMap<SlotIndex, NetworkPolicy>,
}

impl Builder {
    /// Orders first; what should wait is built between them.
    fn run(mut self, mut inbox: mpsc::Receiver<Order>) {
        let mut failures = 0u32;
        loop {
            let order = if self.is_content() {
                inbox.blocking_recv()
            } else if failures > 0 {
                // The error may last: a full table, no memory.
                let pause = PAUSE * (1 << (failures - 1).min(6));
                let waited = async { tokio::time::timeout(pause, inbox.recv()).await };
                match self.runtime.block_on(waited) {
                    Ok(order) => order,
                    Err(_) => Some(Order::Look),
                }
            } else {
                match inbox.try_recv() {
                    Ok(order) => Some(order),
                    Err(mpsc::error::TryRecvError::Empty) => Some(Order::Look),
                    Err(mpsc::error::TryRecvError::Disconnected) => None,
                }
            };
            match order {
                None => return,
                Some(Order::End(reply)) => {
                    let _ = reply.send(self.end());
                    return;
                }
                Some(Order::Look) => match self.tend() {
                    Ok(()) => failures = 0,
                    Err(error) => {
                        failures = failures.saturating_add(1);
                        tracing::warn!(%error, source = ?error.source, failures, "No slot ahead");
                    }
                },
                Some(order) => self.carry_out(order),
            }
        }
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Build(index, policy, reply) => {
                // It may have been built ahead since it was asked for.
                let waiting = self.ready.lock().take(index);
                let built = match waiting {
                    None => self.build(index, &policy),
                    Some(slot) => self.set_rules(index, &policy).map(|()| slot),
                };
                let _ = reply.send(built);
            }
            Order::SetPolicy(index, policy, reply) => {
                let _ = reply.send(self.set_rules(index, &policy));
            }
            Order::Enforce(index, policy, reply) => {
                let _ = reply.send(self.enforce(index, &policy));
            }
            Order::GiveBack(index, reply) => {
                let _ = reply.send(self.give_back(index));
            }
            Order::TakeDown(index, reply) => {
                let _ = reply.send(self.take_down(index));
            }
            Order::Sweep(reply) => {
                let _ = reply.send(self.sweep());
            }
            Order::Look | Order::End(_) => unreachable!("answered by the loop"),
        }
    }

    /// Whether what waits is what should.
    fn is_content(&mut self) -> bool {
        let mut ready = self.ready.lock();
        match ready.surplus() {
            None => ready.wanted().is_none(),
            Some(index) => {
                drop(ready);
                if let Err(error) = self.take_down(index) {
                    tracing::warn!(%error, source = ?error.source, "A slot is left over");
                }
                false
            }
        }
    }

    /// Builds one slot ahead, if one is wanted.
    fn tend(&mut self) -> Result<(), SlotError> {
        let wanted = self.ready.lock().wanted();
        if let Some(index) = wanted {
            let slot = self.build(index, &NetworkPolicy::default())?;
            self.ready.lock().put(slot);
        }
        Ok(())
    }

    fn build(&mut self, index: SlotIndex, policy: &NetworkPolicy) -> Result<Slot, SlotError> {
        self.note(index, policy);
        let rules = || rules::slot_rules(self.pool, &self.egress, policy);
        slot::build(
            &self.runtime,
            &self.instance,
            self.pool,
            index,
            policy,
            rules,
        )
    }

    fn set_rules(&mut self, index: SlotIndex, policy: &NetworkPolicy) -> Result<(), SlotError> {
        let before = self.special.get(&index).cloned().unwrap_or_default();
        if *policy == before {
            return Ok(());
        }
        let rules = || rules::slot_rules(self.pool, &self.egress, policy);
        slot::set_policy(&self.instance, index, (&before, policy), rules)?;
        self.note(index, policy);
        Ok(())
    }

    fn enforce(&mut self, index: SlotIndex, policy: &NetworkPolicy) -> Result<(), SlotError> {
        // Limits differ in any case, so that each of them is set or removed.
        let other = |limit: Option<u64>| limit.is_none().then_some(1);
        let before = NetworkPolicy {
            ingress_kbit_s: other(policy.ingress_kbit_s),
            egress_kbit_s: other(policy.egress_kbit_s),
            ..NetworkPolicy::default()
        };
        let rules = || rules::slot_rules(self.pool, &self.egress, policy);
        slot::set_policy(&self.instance, index, (&before, policy), rules)?;
        self.note(index, policy);
        Ok(())
    }

    fn note(&mut self, index: SlotIndex, policy: &NetworkPolicy) {
        if *policy == NetworkPolicy::default() {
            self.special.remove(&index);
        } else {
            self.special.insert(index, policy.clone());
        }
    }

    fn give_back(&mut self, index: SlotIndex) -> Result<(), SlotError> {
        if !self.ready.lock().keeps() {
            return self.take_down(index);
        }
        let cleaned = self
            .set_rules(index, &NetworkPolicy::default())
            .and_then(|()| slot::forget_connections(&self.instance, self.pool, index));
        match cleaned {
            Ok(()) => {
                let slot = slot::describe(&self.instance, self.pool, index);
                self.ready.lock().put(slot);
                Ok(())
            }
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => {
                tracing::warn!(%error, source = ?error.source, "A slot can't be used again");
                self.take_down(index)
            }
        }
    }

    fn take_down(&mut self, index: SlotIndex) -> Result<(), SlotError> {
        slot::take_down(&self.runtime, &self.instance, index)?;
        // The host's memory of them would lead to the next slot of this address.
        if let Err(error) = nftables::forget_connections_of(self.pool.sandbox_end(index)) {
            tracing::warn!(slot = index.0, %error, "Its connections are not forgotten");
        }
        Ok(())
    }

    /// Nobody but this thread builds slots, so none is half made now.
    fn sweep(&mut self) -> Vec<Swept> {
        let existing = existing(&self.instance).unwrap_or_default().into_iter();
        let nobodys: Vec<SlotIndex> = {
            let ready = self.ready.lock();
            existing.filter(|index| !ready.has(*index)).collect()
        };
        let mut swept = Vec::new();
        for index in nobodys {
            let name = address::namespace(&self.instance, index);
            let ended = reconcile::end_processes_in(&name);
            let ended = ended.map_err(|source| SlotError {
                slot: index,
                operation: "ending processes in it",
                source,
            });
            swept.push((index, ended.and_then(|_| self.take_down(index))));
        }
        swept
    }

    fn end(&mut self) -> io::Result<()> {
        let waiting = self.ready.lock().close();
        for index in waiting {
            self.take_down(index).map_err(|error| error.source)?;
        }
        nftables::apply(rules::no_host_rules(&self.instance))
    }
}

/// The slots of this instance that exist on the host.
///
/// # Errors
/// `/run/netns` can't be read.
pub fn existing(instance: &str) -> io::Result<Vec<SlotIndex>> {
    let prefix = address::namespace(instance, SlotIndex(0));
    let prefix = prefix.trim_end_matches('0');
    let names = namespace::list(prefix)?;
    Ok(names
        .iter()
        .filter_map(|name| name[prefix.len()..].parse().ok().map(SlotIndex))
        .collect())
}
