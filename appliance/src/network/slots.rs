//! The thread that builds slots and takes them down, and the handle to it.

use std::fs;
use std::io;

use http_api::wire::NetworkPolicy;
use tokio::sync::{mpsc, oneshot};

use super::address::{Pool, SlotIndex};
use super::rules::{self, Egress};
use super::slot::{self, Slot, SlotError};
use super::{address, namespace, nftables};

enum Order {
    Build(
        SlotIndex,
        NetworkPolicy,
        oneshot::Sender<Result<Slot, SlotError>>,
    ),
    SetPolicy(
        SlotIndex,
        NetworkPolicy,
        oneshot::Sender<Result<(), SlotError>>,
    ),
    TakeDown(SlotIndex, oneshot::Sender<Result<(), SlotError>>),
    End(oneshot::Sender<io::Result<()>>),
}

/// A handle to the slot thread; it ends with its last handle.
#[derive(Clone, Debug)]
pub struct Slots {
    orders: mpsc::Sender<Order>,
    pool: Pool,
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
        let (orders, mut inbox) = mpsc::channel(64);
        let instance = instance.to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("slots".into())
            .spawn(move || {
                while let Some(order) = inbox.blocking_recv() {
                    match order {
                        Order::Build(index, policy, reply) => {
                            let rules = || rules::slot_rules(pool, &egress, &policy);
                            let built = slot::build(&runtime, &instance, pool, index, rules);
                            let _ = reply.send(built);
                        }
                        Order::SetPolicy(index, policy, reply) => {
                            let rules = || rules::slot_rules(pool, &egress, &policy);
                            let _ = reply.send(slot::set_rules(&instance, index, rules));
                        }
                        Order::TakeDown(index, reply) => {
                            let _ = reply.send(slot::take_down(&runtime, &instance, index));
                        }
                        Order::End(reply) => {
                            let removed = nftables::apply(rules::no_host_rules(&instance));
                            let _ = reply.send(removed);
                            return;
                        }
                    }
                }
            })?;
        Ok(Self { orders, pool })
    }

    /// The addresses that slots are made of.
    #[must_use]
    pub fn pool(&self) -> Pool {
        self.pool
    }

    /// Builds a slot.
    ///
    /// # Errors
    /// Which step failed; nothing of it is left.
    pub async fn build(&self, index: SlotIndex, policy: NetworkPolicy) -> Result<Slot, SlotError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.orders.send(Order::Build(index, policy, reply)).await;
        match (sent, answer.await) {
            (Ok(()), Ok(result)) => result,
            _ => Err(gone(index)),
        }
    }

    /// Replaces what a built slot's guest may reach, as one transaction. Connections that are
    /// established go on.
    ///
    /// # Errors
    /// Which step failed; the rules are as before.
    pub async fn set_policy(
        &self,
        index: SlotIndex,
        policy: NetworkPolicy,
    ) -> Result<(), SlotError> {
        let (reply, answer) = oneshot::channel();
        let sent = self
            .orders
            .send(Order::SetPolicy(index, policy, reply))
            .await;
        match (sent, answer.await) {
            (Ok(()), Ok(result)) => result,
            _ => Err(gone(index)),
        }
    }

    /// Takes a slot down.
    ///
    /// # Errors
    /// Which step failed.
    pub async fn take_down(&self, index: SlotIndex) -> Result<(), SlotError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.orders.send(Order::TakeDown(index, reply)).await;
        match (sent, answer.await) {
            (Ok(()), Ok(result)) => result,
            _ => Err(gone(index)),
        }
    }
}

fn gone(slot: SlotIndex) -> SlotError {
    let source = io::Error::other("the slot thread has ended");
    SlotError {
        slot,
        operation: "asking for it",
        source,
    }
}

impl Slots {
    /// Removes the host's rules and ends the thread; when no slot is left.
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
