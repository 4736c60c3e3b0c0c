//! The listening sockets in /proc/net/tcp and tcp6. Pure.
//!
//! ```text
//!   sl  local_address rem_address   st …
//!    0: 0100007F:1F90 00000000:0000 0A …
//! ```
//! Addresses are the kernel's words, each in the byte order of the machine. Source: Linux
//! `Documentation/networking/proc_net_tcp.rst`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;

const LISTENING: &str = "0A";

/// A port that somebody listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Port {
    port: u16,
    /// Only to the guest itself: the host can't reach it.
    loopback: bool,
}

/// The ports in the two files, without our own.
pub(super) fn ports(tcp: &str, tcp6: &str, own: u16) -> Vec<Port> {
    let mut loopback: BTreeMap<u16, bool> = BTreeMap::new();
    for (address, port) in tcp.lines().chain(tcp6.lines()).filter_map(listener) {
        if port != own {
            let only = loopback.entry(port).or_insert(true);
            *only &= is_loopback(address);
        }
    }
    let ports = loopback.into_iter();
    ports
        .map(|(port, loopback)| Port { port, loopback })
        .collect()
}

fn listener(line: &str) -> Option<(IpAddr, u16)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (address, port) = fields.next()?.split_once(':')?;
    let state = fields.nth(1)?;
    if state != LISTENING {
        return None;
    }
    Some((ip(address)?, u16::from_str_radix(port, 16).ok()?))
}

fn ip(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(hex.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (index, to) in bytes.chunks_exact_mut(4).enumerate() {
                to.copy_from_slice(&word(index * 8)?);
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_found_in_both_families() {
        let tcp = "  sl  local_address rem_address   st tx_queue\n\
                   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000\n\
                   1: 00000000:C33F 00000000:0000 0A 0:0\n\
                   2: 00000000:0050 00000000:0000 0A 0:0\n\
                   3: 0100007F:9999 0100007F:1F90 01 0:0\n\
                   garbage\n";
        let tcp6 = "  sl  local_address rem_address st\n\
                    0: 00000000000000000000000001000000:0BB8 0:0 0A\n\
                    1: 0000000000000000FFFF00000100007F:0BB9 0:0 0A\n\
                    2: 00000000000000000000000000000000:1F90 0:0 0A\n";
        let found = ports(tcp, tcp6, 49983);
        let expect = |port, loopback| Port { port, loopback };
        let expected = [
            expect(80, false),
            expect(3000, true),
            expect(3001, true),
            expect(8080, false),
        ];
        assert_eq!(found, expected);
        assert_eq!(ports("", "", 1), []);
    }
}
