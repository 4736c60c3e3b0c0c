//! Sending a batch to the kernel, and reading its judgement.

use std::io;
use std::net::Ipv4Addr;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::network::attribute::{nested, plain};

use super::{Batch, FAMILY_IPV4, FAMILY_UNSPEC, GETTABLE, NLM_F_ACK, NLM_F_REQUEST};

/// Applies a batch in the calling thread's namespace, as one transaction.
///
/// # Errors
/// What the kernel says of the first message it refuses; nothing is applied then.
pub fn apply(batch: Batch) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    let (batch, messages) = batch.finish();
    socket.send_to(&batch, &SocketAddr::new(0, 0), 0)?;
    let mut acknowledged = 0;
    while acknowledged < messages {
        let (bytes, _) = socket.recv_from_full()?;
        acknowledged += check_acknowledgements(&bytes)?;
    }
    Ok(())
}

/// Ends the tracking of every connection in the calling thread's namespace: what goes on is a new
/// one, and is judged as such.
///
/// # Errors
/// The kernel doesn't track connections, or refuses.
pub fn forget_connections() -> io::Result<()> {
    /// `NFNL_SUBSYS_CTNETLINK`, `IPCTNL_MSG_CT_DELETE`: without a filter, all of them.
    const DELETE: u16 = 1 << 8 | 2;
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    let mut request = Batch::default();
    request.message(DELETE, NLM_F_REQUEST | NLM_F_ACK, FAMILY_UNSPEC, 0, |_| {});
    socket.send_to(&request.bytes, &SocketAddr::new(0, 0), 0)?;
    let (bytes, _) = socket.recv_from_full()?;
    check_acknowledgements(&bytes).map(|_| ())
}

/// Ends the tracking of the connections that an address began or was sent, in the calling thread's
/// namespace: packets that still come for one of them are nobody's.
///
/// # Errors
/// As [`forget_connections`]; before Linux 5.8 there is no such filter.
pub fn forget_connections_of(address: Ipv4Addr) -> io::Result<()> {
    const DELETE: u16 = 1 << 8 | 2;
    // `ctattr_type`, `ctattr_tuple`, `ctattr_ip`, `ctattr_filter`, and the flags of a filter.
    // Source: linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c.
    const TUPLE_ORIG: u16 = 1;
    const TUPLE_IP: u16 = 1;
    const FILTER: u16 = 25;
    const FILTER_ORIG_FLAGS: u16 = 1;
    const FILTER_REPLY_FLAGS: u16 = 2;
    for (field, flag) in [(1u16, 1u32 << 0), (2, 1 << 1)] {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        let mut request = Batch::default();
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        request.message(DELETE, flags, FAMILY_IPV4, 0, |out| {
            nested(out, TUPLE_ORIG, |out| {
                nested(out, TUPLE_IP, |out| plain(out, field, &address.octets()));
            });
            nested(out, FILTER, |out| {
                plain(out, FILTER_ORIG_FLAGS, &flag.to_ne_bytes());
                plain(out, FILTER_REPLY_FLAGS, &0u32.to_ne_bytes());
            });
        });
        socket.send_to(&request.bytes, &SocketAddr::new(0, 0), 0)?;
        let (bytes, _) = socket.recv_from_full()?;
        check_acknowledgements(&bytes)?;
    }
    Ok(())
}

/// The names of the IPv4 tables in the calling thread's namespace.
///
/// # Errors
/// The kernel has no nf_tables.
pub fn tables() -> io::Result<Vec<String>> {
    const NLM_F_DUMP: u16 = 0x300;
    const NLMSG_DONE: u16 = 3;
    /// Behind `nlmsghdr` and `nfgenmsg`.
    const FIRST_ATTRIBUTE: usize = 20;
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    let mut request = Batch::default();
    request.message(GETTABLE, NLM_F_REQUEST | NLM_F_DUMP, FAMILY_IPV4, 0, |_| {});
    socket.send_to(&request.bytes, &SocketAddr::new(0, 0), 0)?;
    let mut names = Vec::new();
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        for (kind, message) in messages(&bytes) {
            if kind == NLMSG_DONE {
                return Ok(names);
            }
            check_acknowledgement(kind, message)?;
            // The name is the first attribute of a table.
            let name = message.get(FIRST_ATTRIBUTE + 4..).unwrap_or_default();
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    }
}

/// The messages of a datagram: their kinds, and their bytes with the header.
fn messages(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
        let message = rest.get(..len).filter(|message| message.len() >= 16)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([message[4], message[5]]), message))
    })
}

/// How many messages of a datagram are acknowledgements.
pub(in crate::network) fn check_acknowledgements(bytes: &[u8]) -> io::Result<u32> {
    let acknowledged = messages(bytes).map(|(kind, message)| check_acknowledgement(kind, message));
    acknowledged.sum()
}

/// An `NLMSG_ERROR` with errno zero is an acknowledgement: 1; other messages are none.
fn check_acknowledgement(kind: u16, message: &[u8]) -> io::Result<u32> {
    const NLMSG_ERROR: u16 = 2;
    let errno = message.get(16..20).and_then(|errno| errno.try_into().ok());
    match (kind, errno.map(i32::from_ne_bytes)) {
        (NLMSG_ERROR, Some(0)) => Ok(1),
        (NLMSG_ERROR, Some(errno)) => Err(io::Error::from_raw_os_error(-errno)),
        (NLMSG_ERROR, None) => Err(io::ErrorKind::InvalidData.into()),
        _ => Ok(0),
    }
}
