//! Who may reach whom, as values: the rules inside every slot and those of the host.
//!
//! ```text
//!  guest ─ tap0 ─┐ arriving: only the guest's own address
//!                ├ name lookups to the gateway go to the resolver
//!                ├ never: closed networks │ else: the outside, if it is allowed
//!                └ veth0, in the slot's address ─▶ host ─ never: other slots, the host itself
//!                                                    └ outside, in the host's address
//! ```
//!
//! What a guest could forge is judged inside its slot, where it can't reach; the host only has
//! to know which packets come from slots. A host's own addresses are closed by what a packet
//! *is for* (its input), not by a list of them.

use std::net::Ipv4Addr;

use http_api::wire::NetworkPolicy;
use ipnet::Ipv4Net;

use super::address::{GATEWAY, GUEST, INNER_LINK, Pool, TAP};
use super::nftables::{Batch, Hook, Statement};

const TABLE: &str = "thaw";
const TCP: u8 = 6;
const UDP: u8 = 17;
const DNS: u16 = 53;

/// What guests may reach outside of their slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Egress {
    /// Whether they may reach anything at all.
    pub internet: bool,
    /// Networks they may never reach.
    pub closed: Vec<Ipv4Net>,
    /// Who answers name lookups that are sent to the gateway.
    pub resolver: Option<Ipv4Addr>,
}

/// The rules inside a slot: what the host allows its guests, and of that, what this one may.
#[must_use]
pub fn slot_rules(pool: Pool, egress: &Egress, policy: &NetworkPolicy) -> Batch {
    use Statement as S;
    let mut batch = Batch::new();
    batch.replace_table(TABLE);

    batch.chain(TABLE, "arriving", Hook::Arriving);
    let forged = [S::InputLink(TAP), S::SourceNotIn(GUEST.into()), S::Drop];
    batch.rule(TABLE, "arriving", &forged);

    batch.chain(TABLE, "inbound", Hook::PreroutingDnat);
    let to_guest = [S::InputLink(INNER_LINK), S::DestinationNat(GUEST)];
    batch.rule(TABLE, "inbound", &to_guest);
    if let Some(resolver) = resolver_for(egress, policy) {
        for protocol in [UDP, TCP] {
            let lookup = [
                S::InputLink(TAP),
                S::DestinationIn(GATEWAY.into()),
                S::Protocol(protocol),
                S::DestinationPort(DNS),
                S::DestinationNat(resolver),
            ];
            batch.rule(TABLE, "inbound", &lookup);
        }
    }

    batch.chain(TABLE, "through", Hook::ForwardDropping);
    batch.rule(TABLE, "through", &[S::Established, S::Accept]);
    batch.rule(TABLE, "through", &[S::InputLink(INNER_LINK), S::Accept]);
    if egress.internet {
        through_to_the_outside(&mut batch, pool, egress, policy);
    }

    batch.chain(TABLE, "outbound", Hook::PostroutingSnat);
    batch.rule(
        TABLE,
        "outbound",
        &[S::OutputLink(INNER_LINK), S::Masquerade],
    );

    // The slot has nothing that listens, and shall never have.
    batch.chain(TABLE, "input", Hook::Input);
    batch.rule(TABLE, "input", &[S::InputLink(TAP), S::Drop]);
    batch
}

/// Who answers this guest's name lookups, if it may reach anything.
fn resolver_for(egress: &Egress, policy: &NetworkPolicy) -> Option<Ipv4Addr> {
    let reaches = policy.allow_internet_access || !policy.allow.is_empty();
    egress.resolver.filter(|_| egress.internet && reaches)
}

fn through_to_the_outside(batch: &mut Batch, pool: Pool, egress: &Egress, policy: &NetworkPolicy) {
    use Statement as S;
    let mut from_guest = |statements: &[S<'_>]| {
        let rule = [&[S::InputLink(TAP)], statements].concat();
        batch.rule(TABLE, "through", &rule);
    };
    from_guest(&[S::DestinationIn(pool.network()), S::Drop]);
    // Before the closed networks: a resolver often is in one of them.
    if let Some(resolver) = resolver_for(egress, policy) {
        for protocol in [UDP, TCP] {
            from_guest(&[
                S::DestinationIn(resolver.into()),
                S::Protocol(protocol),
                S::DestinationPort(DNS),
                S::Accept,
            ]);
        }
    }
    for net in &egress.closed {
        from_guest(&[S::DestinationIn(*net), S::Drop]);
    }
    for net in &policy.allow {
        from_guest(&[S::DestinationIn(*net), S::Accept]);
    }
    for net in &policy.deny {
        from_guest(&[S::DestinationIn(*net), S::Drop]);
    }
    if policy.allow_internet_access {
        from_guest(&[S::Accept]);
    }
}

/// The rules of the host for all slots of an instance.
#[must_use]
pub fn host_rules(instance: &str, pool: Pool) -> Batch {
    use Statement as S;
    let (table, slots) = (host_table(instance), pool.network());
    // Another instance's links may begin alike, but are not of this pool.
    let from_slot = [S::InputLinkPrefix(instance), S::SourceIn(slots)];
    let mut batch = Batch::new();
    batch.replace_table(&table);

    batch.chain(&table, "input", Hook::Input);
    batch.rule(
        &table,
        "input",
        &[&from_slot[..], &[S::Established, S::Accept]].concat(),
    );
    batch.rule(&table, "input", &[&from_slot[..], &[S::Drop]].concat());

    batch.chain(&table, "forward", Hook::Forward);
    let to_other_slots = [S::DestinationIn(slots), S::Drop];
    batch.rule(&table, "forward", &[S::Established, S::Accept]);
    // From other slots or from outside: only the host itself begins a connection to a guest.
    batch.rule(&table, "forward", &to_other_slots);

    batch.chain(&table, "outbound", Hook::PostroutingSnat);
    let outward = [
        S::SourceIn(slots),
        S::DestinationNotIn(slots),
        S::Masquerade,
    ];
    batch.rule(&table, "outbound", &outward);
    batch
}

/// Removes the host's rules.
#[must_use]
pub fn no_host_rules(instance: &str) -> Batch {
    let mut batch = Batch::new();
    batch.remove_table(&host_table(instance));
    batch
}

fn host_table(instance: &str) -> String {
    format!("thaw-{instance}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages_of(batch: Batch) -> u32 {
        let (bytes, messages) = batch.finish();
        let (mut at, mut count) = (0, 0);
        while at < bytes.len() {
            let len = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
            assert!(len >= 20 && len.is_multiple_of(4), "message of {len} bytes");
            at += len;
            count += 1;
        }
        assert_eq!(at, bytes.len());
        assert_eq!(count, messages + 2, "with the batch's begin and end");
        messages
    }

    #[test]
    fn messages_are_aligned_and_say_their_length() {
        let pool = "10.213.0.0/16".parse().unwrap();
        let mut egress = Egress {
            internet: false,
            closed: vec!["10.0.0.0/8".parse().unwrap()],
            resolver: Some(Ipv4Addr::new(192, 0, 2, 1)),
        };
        let mut policy = NetworkPolicy::default();
        let cut_off = messages_of(slot_rules(pool, &egress, &policy));
        egress.internet = true;
        // Two lookups redirected, two accepted, the pool, one closed network, the rest.
        assert_eq!(messages_of(slot_rules(pool, &egress, &policy)), cut_off + 7);
        policy.allow_internet_access = false;
        // The pool and the closed network.
        assert_eq!(messages_of(slot_rules(pool, &egress, &policy)), cut_off + 2);
        policy.allow.push("192.0.2.0/24".parse().unwrap());
        assert_eq!(messages_of(slot_rules(pool, &egress, &policy)), cut_off + 7);
        assert_eq!(messages_of(host_rules("thaw", pool)), 3 + 3 + 5);
        assert_eq!(messages_of(no_host_rules("thaw")), 2);
    }
}
