//! nf_tables messages: just what slots and their host need, encoded by hand.
//!
//! No crate speaks this under a licence we can use without binding a C library, and the
//! protocol is plain: nested attributes in netlink messages between a batch's begin and
//! end. All-or-nothing: the kernel applies a batch as one transaction.
//!
//! Source: `linux/netfilter/nf_tables.h`, `linux/netfilter/nfnetlink.h` (6.18).

mod connections;
mod socket;
mod statement;

pub use connections::{forget_connections, forget_connections_of, forget_one_by_one};
pub(super) use socket::check_acknowledgements;
pub use socket::{apply, tables};
pub use statement::Statement;

use super::attribute::{nested, plain, string};

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

const SUBSYS_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = SUBSYS_NFTABLES << 8;
const GETTABLE: u16 = SUBSYS_NFTABLES << 8 | 1;
const DELTABLE: u16 = SUBSYS_NFTABLES << 8 | 2;
const NEWCHAIN: u16 = SUBSYS_NFTABLES << 8 | 3;
const NEWRULE: u16 = SUBSYS_NFTABLES << 8 | 6;

const FAMILY_UNSPEC: u8 = 0;
const FAMILY_IPV4: u8 = 2;

/// Where a chain sees packets, and in what order relative to others.
#[derive(Clone, Copy, Debug)]
pub enum Hook {
    /// Whatever arrives, before connections are tracked.
    Arriving,
    /// Destination NAT, before routing.
    PreroutingDnat,
    /// Packets for this namespace itself; what no rule drops is accepted.
    Input,
    /// Packets passing through; what no rule drops is accepted.
    Forward,
    /// Packets passing through; what no rule accepts is dropped.
    ForwardDropping,
    /// Source NAT, after routing.
    PostroutingSnat,
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

    /// Begins a table anew: whatever was in one of this name is gone with the transaction.
    pub fn replace_table(&mut self, name: &str) {
        self.remove_table(name);
        self.command(NEWTABLE, NLM_F_CREATE, |out| string(out, 1, name));
    }

    /// Removes a table; that there is none is no error.
    pub fn remove_table(&mut self, name: &str) {
        self.command(NEWTABLE, NLM_F_CREATE, |out| string(out, 1, name));
        self.command(DELTABLE, 0, |out| string(out, 1, name));
    }

    /// Adds a base chain.
    pub fn chain(&mut self, table: &str, name: &str, hook: Hook) {
        const DROP: Option<u32> = Some(0);
        let (number, priority, kind, policy): (u32, i32, &str, Option<u32>) = match hook {
            Hook::Arriving => (0, -300, "filter", None),
            Hook::PreroutingDnat => (0, -100, "nat", None),
            Hook::Input => (1, 0, "filter", None),
            Hook::Forward => (2, 0, "filter", None),
            Hook::ForwardDropping => (2, 0, "filter", DROP),
            Hook::PostroutingSnat => (4, 100, "nat", None),
        };
        self.command(NEWCHAIN, NLM_F_CREATE, |out| {
            string(out, 1, table);
            string(out, 3, name);
            nested(out, 4, |out| {
                plain(out, 1, &number.to_be_bytes());
                plain(out, 2, &priority.to_be_bytes());
            });
            if let Some(policy) = policy {
                plain(out, 5, &policy.to_be_bytes());
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
                    statement.encode(out);
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
