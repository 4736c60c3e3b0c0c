//! What the kernel remembers of connections: it is to forget those of a guest that is gone, so that
//! no packet of them reaches the next one.
//!
//! Newer kernels delete by a filter. Older ones, 6.1 among them, list by one, and each that is
//! listed is deleted by itself.
//!
//! Source: `linux/netfilter/nfnetlink_conntrack.h`, `net/netfilter/nf_conntrack_netlink.c`.

use std::io;
use std::net::Ipv4Addr;

use super::socket::{ask, dump};
use super::{Batch, FAMILY_IPV4, FAMILY_UNSPEC, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use crate::network::attribute::{nested, plain};

/// `NFNL_SUBSYS_CTNETLINK` with `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE`.
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;

/// `ctattr_type`.
const TUPLE_ORIG: u16 = 1;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;

/// Ends the tracking of every connection in the calling thread's namespace: what goes on is a new
/// one, and is judged as such.
///
/// # Errors
/// The kernel doesn't track connections, or refuses.
pub fn forget_connections() -> io::Result<()> {
    let mut request = Batch::default();
    // Without a filter, all of them.
    request.message(DELETE, NLM_F_REQUEST | NLM_F_ACK, FAMILY_UNSPEC, 0, |_| {});
    ask(&request)
}

/// Ends the tracking of the connections that an address began or was sent, in the calling thread's
/// namespace: packets that still come for one of them are nobody's.
///
/// # Errors
/// As [`forget_connections`].
pub fn forget_connections_of(address: Ipv4Addr) -> io::Result<()> {
    match forget_by_filter(address) {
        // It takes the filter for a connection that is not described in full.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => forget_one_by_one(address),
        done => done,
    }
}

/// The connections by which end the address is.
const ENDS: [End; 2] = [
    End {
        field: 1,
        flag: 1 << 0,
    },
    End {
        field: 2,
        flag: 1 << 1,
    },
];

/// `ctattr_ip` of the direction in which a connection began, and its flag in a filter.
#[derive(Clone, Copy, Debug)]
struct End {
    field: u16,
    flag: u32,
}

impl End {
    fn write_filter(self, out: &mut Vec<u8>, address: Ipv4Addr) {
        const TUPLE_IP: u16 = 1;
        const FILTER_ORIG_FLAGS: u16 = 1;
        const FILTER_REPLY_FLAGS: u16 = 2;
        nested(out, TUPLE_ORIG, |out| {
            nested(out, TUPLE_IP, |out| {
                plain(out, self.field, &address.octets());
            });
        });
        nested(out, FILTER, |out| {
            plain(out, FILTER_ORIG_FLAGS, &self.flag.to_ne_bytes());
            plain(out, FILTER_REPLY_FLAGS, &0u32.to_ne_bytes());
        });
    }
}

fn forget_by_filter(address: Ipv4Addr) -> io::Result<()> {
    for end in ENDS {
        let mut request = Batch::default();
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        request.message(DELETE, flags, FAMILY_IPV4, 0, |out| {
            end.write_filter(out, address);
        });
        ask(&request)?;
    }
    Ok(())
}

/// As [`forget_connections_of`], on kernels without a deletion by filter; slower by a listing.
///
/// # Errors
/// As [`forget_connections`]; before Linux 5.8 there is no such filter at all.
pub fn forget_one_by_one(address: Ipv4Addr) -> io::Result<()> {
    for end in ENDS {
        let mut request = Batch::default();
        request.message(GET, NLM_F_REQUEST | NLM_F_DUMP, FAMILY_IPV4, 0, |out| {
            end.write_filter(out, address);
        });
        let mut found = Vec::new();
        dump(&request, |attributes| found.push(identity(attributes)))?;
        for identity in found {
            let mut request = Batch::default();
            let flags = NLM_F_REQUEST | NLM_F_ACK;
            request.message(DELETE, flags, FAMILY_IPV4, 0, |out| {
                out.extend_from_slice(&identity);
            });
            match ask(&request) {
                // It has ended by itself.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
    }
    Ok(())
}

/// Of the attributes of a connection, those that it is found by, and by which no other one is
/// that has come to the same addresses since.
fn identity(attributes: &[u8]) -> Vec<u8> {
    const KIND: u16 = 0x3FFF;
    let mut identity = Vec::new();
    let mut rest = attributes;
    while let Some(header) = rest.first_chunk::<4>() {
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & KIND;
        let Some(attribute) = rest.get(..len).filter(|attribute| attribute.len() >= 4) else {
            break;
        };
        if matches!(kind, TUPLE_ORIG | ID | ZONE) {
            identity.extend_from_slice(attribute);
            identity.resize(identity.len().next_multiple_of(4), 0);
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    identity
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_known_by_tuple_id_and_zone() {
        let mut all = Vec::new();
        plain(&mut all, 3, &7u32.to_be_bytes());
        nested(&mut all, TUPLE_ORIG, |out| plain(out, 1, &[1, 2, 3]));
        plain(&mut all, ZONE, &5u16.to_be_bytes());
        plain(&mut all, 24, b"label");
        plain(&mut all, ID, &9u32.to_be_bytes());
        let mut expected = Vec::new();
        nested(&mut expected, TUPLE_ORIG, |out| plain(out, 1, &[1, 2, 3]));
        plain(&mut expected, ZONE, &5u16.to_be_bytes());
        plain(&mut expected, ID, &9u32.to_be_bytes());
        assert_eq!(identity(&all), expected);
        // Cut anywhere, it is no panic and nothing made up.
        for len in 0..all.len() {
            assert!(expected.starts_with(&identity(&all[..len])), "{len}");
        }
    }
}
