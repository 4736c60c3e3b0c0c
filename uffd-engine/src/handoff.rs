//! The hand-off: how a VMM gives its guest's memory to us.
//!
//! The VMM connects to a Unix stream socket and sends one JSON array of regions with
//! its userfaultfd attached, then nothing more; it keeps the connection open as long
//! as it lives. This file turns bytes into checked regions and back; who waits for
//! them, and for how long, is the worker's affair.
//!
//! Source: Firecracker 1.17 `src/vmm/src/persist.rs` (`GuestRegionUffdMapping`) and
//! `docs/snapshotting/handling-page-faults-on-snapshot-resume.md`.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::region::{ClaimedRegion, MAX_REGIONS, RegionError};

/// The longest message accepted: [`MAX_REGIONS`] regions at up to 190 bytes each.
pub const MAX_MESSAGE_BYTES: usize = 192 << 10;

/// One region on the wire. `page_size_kib` holds *bytes* despite its name; older
/// Firecrackers send only that one.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct WireRegion {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    page_size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    page_size_kib: Option<u64>,
}

/// Why a hand-off was refused.
#[derive(Debug, Error)]
pub enum HandoffError {
    /// Not the JSON that VMMs send.
    #[error("The hand-off is not a list of memory regions")]
    Json(#[source] serde_json::Error),
    /// The peer closed before the list was complete.
    #[error("The VMM closed the hand-off after {bytes} bytes of an incomplete message")]
    Incomplete {
        /// Bytes received.
        bytes: usize,
    },
    /// More than [`MAX_MESSAGE_BYTES`].
    #[error("The hand-off is longer than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    /// Anything after the list.
    #[error("The hand-off goes on after its list of regions")]
    Trailing,
    /// Not exactly one descriptor.
    #[error("The hand-off carries {count} descriptors instead of one userfaultfd")]
    Descriptors {
        /// How many there were.
        count: usize,
    },
    /// The descriptor is no usable userfaultfd.
    #[error("The hand-off's descriptor can't be served")]
    NotUffd(#[source] std::io::Error),
    /// The regions can't be.
    #[error("The hand-off's regions can't be served")]
    Regions(#[from] RegionError),
}

/// What is known after some bytes of a message have arrived.
#[derive(Debug)]
pub enum Progress {
    /// The list is not complete yet.
    NeedMore,
    /// The whole list, unchecked.
    Complete(Vec<ClaimedRegion>),
}

/// Reads a hand-off message from the bytes received so far.
///
/// # Errors
/// The bytes can't become a valid message, however many follow.
pub fn parse(bytes: &[u8]) -> Result<Progress, HandoffError> {
    let mut stream = serde_json::Deserializer::from_slice(bytes).into_iter::<Vec<WireRegion>>();
    let regions = match stream.next() {
        None => return need_more(bytes),
        Some(Ok(regions)) => regions,
        Some(Err(error)) if error.is_eof() => return need_more(bytes),
        Some(Err(error)) => return Err(HandoffError::Json(error)),
    };
    if !bytes[stream.byte_offset()..]
        .iter()
        .all(|b| b.is_ascii_whitespace() || *b == 0)
    {
        return Err(HandoffError::Trailing);
    }
    if regions.len() > MAX_REGIONS {
        return Err(RegionError::TooMany {
            count: regions.len(),
        }
        .into());
    }
    Ok(Progress::Complete(regions.iter().map(claimed).collect()))
}

fn need_more(bytes: &[u8]) -> Result<Progress, HandoffError> {
    if bytes.len() >= MAX_MESSAGE_BYTES {
        return Err(HandoffError::TooLong);
    }
    Ok(Progress::NeedMore)
}

fn claimed(wire: &WireRegion) -> ClaimedRegion {
    ClaimedRegion {
        base: wire.base_host_virt_addr,
        size: wire.size,
        offset: wire.offset,
        page_size: wire.page_size.or(wire.page_size_kib).unwrap_or(4096),
    }
}

/// The message for these regions, as a VMM sends it.
///
/// # Panics
/// Never: the structure always serialises.
#[must_use]
pub fn message(regions: &[ClaimedRegion]) -> Vec<u8> {
    let wire: Vec<WireRegion> = regions
        .iter()
        .map(|region| WireRegion {
            base_host_virt_addr: region.base,
            size: region.size,
            offset: region.offset,
            page_size: Some(region.page_size),
            page_size_kib: Some(region.page_size),
        })
        .collect();
    serde_json::to_vec(&wire).expect("a list of integers serialises")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRECRACKER: &[u8] = br#"[{"base_host_virt_addr":140212000000000,"size":134217728,"offset":0,"page_size":4096,"page_size_kib":4096}]"#;

    #[test]
    fn firecrackers_message_is_understood_at_any_split() {
        for split in 0..FIRECRACKER.len() {
            let part = parse(&FIRECRACKER[..split]).unwrap();
            assert!(
                matches!(part, Progress::NeedMore),
                "complete after {split} bytes"
            );
        }
        let Progress::Complete(regions) = parse(FIRECRACKER).unwrap() else {
            panic!()
        };
        assert_eq!(regions[0].size, 128 << 20);
        assert_eq!(regions[0].page_size, 4096);
    }

    #[test]
    fn page_size_kib_is_bytes() {
        let old = br#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size_kib":4096}]"#;
        let Progress::Complete(regions) = parse(old).unwrap() else {
            panic!()
        };
        assert_eq!(regions[0].page_size, 4096);
    }

    #[test]
    fn hostile_messages_are_refused() {
        assert!(matches!(parse(b"{}"), Err(HandoffError::Json(_))));
        assert!(matches!(
            parse(b"[{\"size\":-1}]"),
            Err(HandoffError::Json(_))
        ));
        assert!(matches!(parse(b"[] []"), Err(HandoffError::Trailing)));
        let endless = vec![b' '; MAX_MESSAGE_BYTES];
        assert!(matches!(parse(&endless), Err(HandoffError::TooLong)));
    }

    #[test]
    fn our_message_for_many_regions_fits_and_reads_back() {
        let region = ClaimedRegion {
            base: 1 << 55,
            size: 1 << 30,
            offset: 1 << 50,
            page_size: 2 << 20,
        };
        let regions = vec![region; MAX_REGIONS];
        let bytes = message(&regions);
        assert!(bytes.len() < MAX_MESSAGE_BYTES, "{} bytes", bytes.len());
        let Progress::Complete(back) = parse(&bytes).unwrap() else {
            panic!()
        };
        assert_eq!(back, regions);
    }
}
