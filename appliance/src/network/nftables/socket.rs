//! Sending a batch to the kernel, and reading its judgement.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::{Batch, FAMILY_IPV4, GETTABLE, NLM_F_DUMP, NLM_F_REQUEST};

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

/// The names of the IPv4 tables in the calling thread's namespace.
///
/// # Errors
/// The kernel has no nf_tables.
pub fn tables() -> io::Result<Vec<String>> {
    let mut request = Batch::default();
    request.message(GETTABLE, NLM_F_REQUEST | NLM_F_DUMP, FAMILY_IPV4, 0, |_| {});
    let mut names = Vec::new();
    dump(&request, |attributes| {
        // The name is the first attribute of a table.
        let name = attributes.get(4..).unwrap_or_default();
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        names.push(String::from_utf8_lossy(name).into_owned());
    })?;
    Ok(names)
}

/// Asks for all of something, and gives the attributes of each.
pub(super) fn dump(request: &Batch, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    const NLMSG_DONE: u16 = 3;
    /// Behind `nlmsghdr` and `nfgenmsg`.
    const FIRST_ATTRIBUTE: usize = 20;
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.send_to(&request.bytes, &SocketAddr::new(0, 0), 0)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        for (kind, message) in messages(&bytes) {
            if kind == NLMSG_DONE {
                return Ok(());
            }
            check_acknowledgement(kind, message)?;
            each(message.get(FIRST_ATTRIBUTE..).unwrap_or_default());
        }
    }
}

/// One message, which is acknowledged.
pub(super) fn ask(request: &Batch) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.send_to(&request.bytes, &SocketAddr::new(0, 0), 0)?;
    let (bytes, _) = socket.recv_from_full()?;
    check_acknowledgements(&bytes).map(|_| ())
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
