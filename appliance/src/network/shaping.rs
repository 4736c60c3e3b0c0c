//! What one sandbox may send and be sent in a second: a token bucket at each end of its slot.
//!
//! ```text
//!  guest ◀── tap0: ingress bucket ── slot ── veth0: egress bucket ──▶ host
//! ```
//!
//! Both hold back what leaves the slot's namespace by a link, so they see a guest's traffic only,
//! and nothing of it passes by them. What doesn't fit into a bucket's queue is dropped, which is
//! how TCP finds its rate.
//!
//! Source: `linux/rtnetlink.h`, `linux/pkt_sched.h`, `net/sched/sch_tbf.c` (6.18).

use std::io;

use http_api::wire::NetworkPolicy;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::net::if_::if_nametoindex;

use super::address::{INNER_LINK, TAP};
use super::attribute::{nested, plain, string};
use super::nftables::check_acknowledgements;

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;

const TC_H_ROOT: u32 = 0xFFFF_FFFF;
const HANDLE: u32 = 0x1_0000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const LINKLAYER_ETHERNET: u8 = 1;

/// A bucket holds what arrives in this part of a second…
const BURSTS_PER_SECOND: u64 = 100;
/// …and at least a few packets, at most what the kernel's 32 bits take with the queue.
const BURST_BYTES: std::ops::RangeInclusive<u64> = 16 << 10..=64 << 20;
/// Its queue holds what is sent in this part of a second: longer ones only add delay.
const QUEUES_PER_SECOND: u64 = 10;

/// A bucket's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bucket {
    rate_bytes_s: u64,
    burst_bytes: u32,
    limit_bytes: u32,
}

impl Bucket {
    fn of(kbit_s: u64) -> Self {
        let rate_bytes_s = kbit_s * 125;
        let burst =
            (rate_bytes_s / BURSTS_PER_SECOND).clamp(*BURST_BYTES.start(), *BURST_BYTES.end());
        let limit = burst + rate_bytes_s / QUEUES_PER_SECOND;
        Self {
            rate_bytes_s,
            burst_bytes: burst as u32,
            limit_bytes: u32::try_from(limit).unwrap_or(u32::MAX),
        }
    }
}

/// Puts a policy's limits into force in the calling thread's namespace, a slot's; `before` is
/// what is in force.
///
/// # Errors
/// The kernel has no `sch_tbf`, or the slot no links.
pub(super) fn apply(before: &NetworkPolicy, policy: &NetworkPolicy) -> io::Result<()> {
    for (link, had, wanted) in [
        (INNER_LINK, before.egress_kbit_s, policy.egress_kbit_s),
        (TAP, before.ingress_kbit_s, policy.ingress_kbit_s),
    ] {
        match (had, wanted) {
            (had, wanted) if had == wanted => {}
            (_, Some(kbit_s)) => set(link, Bucket::of(kbit_s))?,
            (_, None) => remove(link)?,
        }
    }
    Ok(())
}

fn set(link: &str, bucket: Bucket) -> io::Result<()> {
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    send(&message(RTM_NEWQDISC, flags, index_of(link)?, |out| {
        string(out, TCA_KIND, "tbf");
        nested(out, TCA_OPTIONS, |out| {
            plain(out, TCA_TBF_PARMS, &parameters(bucket));
            plain(out, TCA_TBF_RATE64, &bucket.rate_bytes_s.to_ne_bytes());
            plain(out, TCA_TBF_BURST, &bucket.burst_bytes.to_ne_bytes());
        });
    }))
}

/// Back to the link's own queue; that there is no bucket is no error.
fn remove(link: &str) -> io::Result<()> {
    match send(&message(RTM_DELQDISC, 0, index_of(link)?, |_| {})) {
        // The kernel's words for the queue that a link has by itself.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result,
    }
}

/// `tc_tbf_qopt`: rate and peak rate of 12 bytes each, limit, and two fields for older kernels.
/// A rate: cell_log, linklayer, overhead (16 bits), cell_align (16), mpu (16), bytes/s (32).
fn parameters(bucket: Bucket) -> [u8; 36] {
    let mut bytes = [0; 36];
    let rate = u32::try_from(bucket.rate_bytes_s).unwrap_or(u32::MAX);
    bytes[1] = LINKLAYER_ETHERNET;
    bytes[8..12].copy_from_slice(&rate.to_ne_bytes());
    bytes[24..28].copy_from_slice(&bucket.limit_bytes.to_ne_bytes());
    bytes
}

/// `nlmsghdr` (16 bytes), `tcmsg` (20 bytes), attributes.
fn message(kind: u16, flags: u16, link: u32, body: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let handle = if kind == RTM_NEWQDISC { HANDLE } else { 0 };
    let mut bytes = vec![0; 4];
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    for field in [0, link, handle, TC_H_ROOT, 0] {
        bytes.extend_from_slice(&field.to_ne_bytes());
    }
    body(&mut bytes);
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

fn send(message: &[u8]) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.send_to(message, &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    check_acknowledgements(&answer).map(|_| ())
}

fn index_of(link: &str) -> io::Result<u32> {
    Ok(if_nametoindex(link)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_holds_a_hundredth_of_a_second_and_at_least_a_few_packets() {
        let slow = Bucket::of(64);
        assert_eq!((slow.rate_bytes_s, slow.burst_bytes), (8000, 16 << 10));
        assert_eq!(slow.limit_bytes, (16 << 10) + 800);
        let fast = Bucket::of(1_000_000);
        assert_eq!(
            (fast.rate_bytes_s, fast.burst_bytes),
            (125_000_000, 1_250_000)
        );
        let fastest = Bucket::of(*http_api::wire::RATES_KBIT_S.end());
        assert_eq!(fastest.burst_bytes, 64 << 20);
        assert_eq!(fastest.limit_bytes, (64 << 20) + 1_250_000_000);
    }

    #[test]
    fn messages_say_their_length() {
        let bytes = message(RTM_NEWQDISC, 0, 3, |out| string(out, TCA_KIND, "tbf"));
        assert_eq!(bytes.len(), 16 + 20 + 8);
        assert_eq!(u32::from_ne_bytes(bytes[..4].try_into().unwrap()), 44);
        assert_eq!(bytes[16 + 4], 3, "the link");
    }
}
