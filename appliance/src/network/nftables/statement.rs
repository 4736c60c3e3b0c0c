//! The statements of rules: what a packet must be like, and what happens to it.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::FAMILY_IPV4;
use crate::network::attribute::{nested, number, string, value};

/// One statement of a rule. A rule's statements hold in order, up to the first that doesn't.
#[derive(Clone, Copy, Debug)]
pub enum Statement<'a> {
    /// The packet came in by this link.
    InputLink(&'a str),
    /// The packet came in by a link whose name begins like this.
    InputLinkPrefix(&'a str),
    /// The packet goes out by this link.
    OutputLink(&'a str),
    /// Its source lies in this network.
    SourceIn(Ipv4Net),
    /// Its source lies elsewhere.
    SourceNotIn(Ipv4Net),
    /// Its destination lies in this network.
    DestinationIn(Ipv4Net),
    /// Its destination lies elsewhere.
    DestinationNotIn(Ipv4Net),
    /// It is of this protocol: 6 is TCP, 17 is UDP.
    Protocol(u8),
    /// Its destination port; behind a [`Statement::Protocol`] that has ports.
    DestinationPort(u16),
    /// The packet belongs to a connection that is established or related.
    Established,
    /// Let it pass.
    Accept,
    /// Forget it.
    Drop,
    /// Send it to this address instead.
    DestinationNat(Ipv4Addr),
    /// Send it in the name of the link it goes out by.
    Masquerade,
}

const REGISTER_VERDICT: u32 = 0;
const REGISTER_1: u32 = 1;
/// `nft_meta_keys`.
const META_INPUT_NAME: u32 = 6;
const META_OUTPUT_NAME: u32 = 7;
const META_PROTOCOL: u32 = 16;
/// `nft_payload_bases`, and where fields are in an IPv4 and in a TCP or UDP header.
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const SOURCE_AT: u32 = 12;
const DESTINATION_AT: u32 = 16;
const DESTINATION_PORT_AT: u32 = 2;

/// `nft_cmp_ops`.
#[derive(Clone, Copy)]
enum Compare {
    Equal = 0,
    NotEqual = 1,
}

impl Statement<'_> {
    pub(super) fn encode(self, out: &mut Vec<u8>) {
        match self {
            Self::InputLink(name) => link(out, META_INPUT_NAME, &padded(name)),
            Self::InputLinkPrefix(name) => link(out, META_INPUT_NAME, name.as_bytes()),
            Self::OutputLink(name) => link(out, META_OUTPUT_NAME, &padded(name)),
            Self::SourceIn(net) => address(out, SOURCE_AT, net, Compare::Equal),
            Self::SourceNotIn(net) => address(out, SOURCE_AT, net, Compare::NotEqual),
            Self::DestinationIn(net) => address(out, DESTINATION_AT, net, Compare::Equal),
            Self::DestinationNotIn(net) => address(out, DESTINATION_AT, net, Compare::NotEqual),
            Self::Protocol(protocol) => {
                meta(out, META_PROTOCOL);
                compare(out, Compare::Equal, &[protocol]);
            }
            Self::DestinationPort(port) => {
                payload(out, TRANSPORT_HEADER, DESTINATION_PORT_AT, 2);
                compare(out, Compare::Equal, &port.to_be_bytes());
            }
            Self::Established => established(out),
            Self::Accept => verdict(out, 1),
            Self::Drop => verdict(out, 0),
            Self::DestinationNat(address) => destination_nat(out, address),
            Self::Masquerade => expression(out, "masq", |_| {}),
        }
    }
}

/// A whole name: compared with its terminating zeros, so that no longer one matches.
fn padded(name: &str) -> [u8; 16] {
    let mut padded = [0; 16];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    padded
}

fn link(out: &mut Vec<u8>, key: u32, name: &[u8]) {
    meta(out, key);
    compare(out, Compare::Equal, name);
}

fn address(out: &mut Vec<u8>, at: u32, net: Ipv4Net, operation: Compare) {
    payload(out, NETWORK_HEADER, at, 4);
    mask(out, net.netmask().octets());
    compare(out, operation, &net.network().octets());
}

fn established(out: &mut Vec<u8>) {
    const CT_STATE: u32 = 0;
    const ESTABLISHED_OR_RELATED: u32 = 2 | 4;
    expression(out, "ct", |out| {
        number(out, 1, REGISTER_1);
        number(out, 2, CT_STATE);
    });
    mask(out, ESTABLISHED_OR_RELATED.to_ne_bytes());
    compare(out, Compare::NotEqual, &[0; 4]);
}

fn destination_nat(out: &mut Vec<u8>, address: Ipv4Addr) {
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

fn verdict(out: &mut Vec<u8>, code: u32) {
    expression(out, "immediate", |out| {
        number(out, 1, REGISTER_VERDICT);
        nested(out, 2, |out| {
            nested(out, 2, |out| number(out, 1, code));
        });
    });
}

fn meta(out: &mut Vec<u8>, key: u32) {
    expression(out, "meta", |out| {
        number(out, 1, REGISTER_1);
        number(out, 2, key);
    });
}

fn payload(out: &mut Vec<u8>, base: u32, at: u32, bytes: u32) {
    expression(out, "payload", |out| {
        number(out, 1, REGISTER_1);
        number(out, 2, base);
        number(out, 3, at);
        number(out, 4, bytes);
    });
}

fn mask(out: &mut Vec<u8>, mask: [u8; 4]) {
    expression(out, "bitwise", |out| {
        number(out, 1, REGISTER_1);
        number(out, 2, REGISTER_1);
        number(out, 3, 4);
        value(out, 4, &mask);
        value(out, 5, &[0; 4]);
    });
}

fn compare(out: &mut Vec<u8>, operation: Compare, with: &[u8]) {
    expression(out, "cmp", |out| {
        number(out, 1, REGISTER_1);
        number(out, 2, operation as u32);
        value(out, 3, with);
    });
}

fn expression(out: &mut Vec<u8>, name: &str, body: impl FnOnce(&mut Vec<u8>)) {
    nested(out, 1, |out| {
        string(out, 1, name);
        nested(out, 2, body);
    });
}
