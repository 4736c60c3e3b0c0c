//! nf_tables messages: just the statements that slots need, encoded by hand.
//!
//! No crate speaks this under a licence we can use without binding a C library, and the
//! protocol is plain: nested attributes in netlink messages between a batch's begin and
//! end. All-or-nothing: the kernel applies a batch as one transaction.
//!
//! Source: `linux/netfilter/nf_tables.h`, `linux/netfilter/nfnetlink.h` (6.18).

use std::net::Ipv4Addr;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

const SUBSYS_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = SUBSYS_NFTABLES << 8;
const NEWCHAIN: u16 = SUBSYS_NFTABLES << 8 | 3;
const NEWRULE: u16 = SUBSYS_NFTABLES << 8 | 6;

const FAMILY_UNSPEC: u8 = 0;
const FAMILY_IPV4: u8 = 2;
const NESTED: u16 = 0x8000;

/// Where a chain sees packets, and in what order relative to others.
#[derive(Clone, Copy, Debug)]
pub enum Hook {
    /// Destination NAT, before routing.
    PreroutingDnat,
    /// Packets passing through; `policy drop`.
    ForwardDropping,
}

/// One statement of a rule.
#[derive(Clone, Copy, Debug)]
pub enum Statement<'a> {
    /// The packet came in by this link.
    InputLink(&'a str),
    /// The packet belongs to a connection that is established or related.
    Established,
    /// Let it pass.
    Accept,
    /// Send it to this address instead.
    DestinationNat(Ipv4Addr),
}

/// A batch under construction.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    messages: u32,
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        let mut batch = Self::default();
        batch.message(
            BATCH_BEGIN,
            NLM_F_REQUEST,
            FAMILY_UNSPEC,
            SUBSYS_NFTABLES,
            |_| {},
        );
        batch
    }

    /// Adds a table.
    pub fn table(&mut self, name: &str) {
        self.command(NEWTABLE, NLM_F_CREATE, |out| string(out, 1, name));
    }

    /// Adds a base chain.
    pub fn chain(&mut self, table: &str, name: &str, hook: Hook) {
        let (number, priority, kind, policy): (u32, i32, &str, Option<u32>) = match hook {
            Hook::PreroutingDnat => (0, -100, "nat", None),
            Hook::ForwardDropping => (2, 0, "filter", Some(0)),
        };
        self.command(NEWCHAIN, NLM_F_CREATE, |out| {
            string(out, 1, table);
            string(out, 3, name);
            nested(out, 4, |out| {
                attribute(out, 1, &number.to_be_bytes());
                attribute(out, 2, &priority.to_be_bytes());
            });
            if let Some(policy) = policy {
                attribute(out, 5, &policy.to_be_bytes());
            }
            string(out, 7, kind);
        });
    }

    /// Appends a rule to a chain.
    pub fn rule(&mut self, table: &str, chain: &str, statements: &[Statement<'_>]) {
        self.command(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |out| {
            string(out, 1, table);
            string(out, 2, chain);
            nested(out, 4, |out| {
                for statement in statements {
                    encode(out, *statement);
                }
            });
        });
    }

    /// Ends the batch; returns its bytes and how many acknowledgements will come.
    #[must_use]
    pub fn finish(mut self) -> (Vec<u8>, u32) {
        self.message(
            BATCH_END,
            NLM_F_REQUEST,
            FAMILY_UNSPEC,
            SUBSYS_NFTABLES,
            |_| {},
        );
        (self.bytes, self.messages)
    }

    fn command(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Vec<u8>)) {
        self.messages += 1;
        self.message(
            kind,
            NLM_F_REQUEST | NLM_F_ACK | flags,
            FAMILY_IPV4,
            0,
            body,
        );
    }

    /// `nlmsghdr` (16 bytes), `nfgenmsg` (4 bytes, resource id big-endian), attributes.
    fn message(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        body: impl FnOnce(&mut Vec<u8>),
    ) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&self.messages.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        body(&mut self.bytes);
        let len = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }
}

/// The rules inside every slot: what comes from the host goes to the guest, answers go
/// back, and nothing that a guest starts leaves its slot.
#[must_use]
pub fn slot_rules(inner_link: &str, guest: Ipv4Addr) -> Batch {
    const TABLE: &str = "thaw";
    let mut batch = Batch::new();
    batch.table(TABLE);
    batch.chain(TABLE, "inbound", Hook::PreroutingDnat);
    batch.rule(
        TABLE,
        "inbound",
        &[
            Statement::InputLink(inner_link),
            Statement::DestinationNat(guest),
        ],
    );
    batch.chain(TABLE, "through", Hook::ForwardDropping);
    batch.rule(
        TABLE,
        "through",
        &[Statement::InputLink(inner_link), Statement::Accept],
    );
    batch.rule(
        TABLE,
        "through",
        &[Statement::Established, Statement::Accept],
    );
    batch
}

const REGISTER_VERDICT: u32 = 0;
const REGISTER_1: u32 = 1;

fn encode(out: &mut Vec<u8>, statement: Statement<'_>) {
    match statement {
        Statement::InputLink(name) => {
            const META_IIFNAME: u32 = 6;
            expression(out, "meta", |out| {
                number(out, 1, REGISTER_1);
                number(out, 2, META_IIFNAME);
            });
            let mut padded = [0u8; 16];
            padded[..name.len()].copy_from_slice(name.as_bytes());
            compare(out, 0, &padded);
        }
        Statement::Established => {
            const CT_STATE: u32 = 0;
            const ESTABLISHED_OR_RELATED: u32 = 2 | 4;
            expression(out, "ct", |out| {
                number(out, 1, REGISTER_1);
                number(out, 2, CT_STATE);
            });
            expression(out, "bitwise", |out| {
                number(out, 1, REGISTER_1);
                number(out, 2, REGISTER_1);
                number(out, 3, 4);
                value(out, 4, &ESTABLISHED_OR_RELATED.to_ne_bytes());
                value(out, 5, &[0; 4]);
            });
            const NOT_EQUAL: u32 = 1;
            compare(out, NOT_EQUAL, &[0; 4]);
        }
        Statement::Accept => {
            const NF_ACCEPT: u32 = 1;
            expression(out, "immediate", |out| {
                number(out, 1, REGISTER_VERDICT);
                nested(out, 2, |out| {
                    nested(out, 2, |out| number(out, 1, NF_ACCEPT));
                });
            });
        }
        Statement::DestinationNat(address) => {
            const NAT_DNAT: u32 = 1;
            expression(out, "immediate", |out| {
                number(out, 1, REGISTER_1);
                value(out, 2, &address.octets());
            });
            expression(out, "nat", |out| {
                number(out, 1, NAT_DNAT);
                number(out, 2, u32::from(FAMILY_IPV4));
                number(out, 3, REGISTER_1);
            });
        }
    }
}

fn compare(out: &mut Vec<u8>, operation: u32, with: &[u8]) {
    expression(out, "cmp", |out| {
        number(out, 1, REGISTER_1);
        number(out, 2, operation);
        value(out, 3, with);
    });
}

fn expression(out: &mut Vec<u8>, name: &str, body: impl FnOnce(&mut Vec<u8>)) {
    nested(out, 1, |out| {
        string(out, 1, name);
        nested(out, 2, body);
    });
}

/// `NFTA_DATA_VALUE` inside attribute `kind`.
fn value(out: &mut Vec<u8>, kind: u16, bytes: &[u8]) {
    nested(out, kind, |out| attribute(out, 1, bytes));
}

fn number(out: &mut Vec<u8>, kind: u16, value: u32) {
    attribute(out, kind, &value.to_be_bytes());
}

fn string(out: &mut Vec<u8>, kind: u16, text: &str) {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    attribute(out, kind, &bytes);
}

fn attribute(out: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    out.extend_from_slice(&((payload.len() + 4) as u16).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(payload);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn nested(out: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&(kind | NESTED).to_ne_bytes());
    body(out);
    let len = (out.len() - start) as u16;
    out[start..start + 2].copy_from_slice(&len.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_aligned_and_say_their_length() {
        let (bytes, messages) = slot_rules("veth0", Ipv4Addr::new(169, 254, 100, 2)).finish();
        assert_eq!(messages, 6);
        let mut at = 0;
        let mut count = 0;
        while at < bytes.len() {
            let len = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
            assert!(len >= 20 && len.is_multiple_of(4), "message of {len} bytes");
            at += len;
            count += 1;
        }
        assert_eq!(at, bytes.len());
        assert_eq!(count, messages + 2);
    }
}
