//! Where the machine's memory is in /proc/kcore, a file in the format of a core dump. Pure.
//!
//! Its segments with a physical address are memory; the others are mappings of the kernel, which
//! show some of the same memory again. The kernel's own text is shown twice with an address.
//! Source: Linux `fs/proc/kcore.c`, elf(5).

use std::ops::Range;

/// A 64-bit ELF file begins with this: magic, class, little-endian.
const MAGIC: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
const PT_LOAD: u32 = 1;
/// Physical address of what is no memory.
const NO_ADDRESS: u64 = u64::MAX;
/// Bytes of an ELF header, and of one of a segment.
const HEADER: usize = 64;
const SEGMENT: usize = 56;

/// A run of memory, as bytes of the file.
pub(super) type Run = Range<u64>;

/// What was wrong with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Not a 64-bit little-endian core file, or a truncated one")]
pub(super) struct NotACore;

/// The runs of memory, each byte once, by physical address; `start` is how the file begins.
pub(super) fn runs(start: &[u8]) -> Result<Vec<Run>, NotACore> {
    if !start.starts_with(&MAGIC) || start.len() < HEADER {
        return Err(NotACore);
    }
    let table = usize::try_from(u64_at(start, 32)?).map_err(|_| NotACore)?;
    let (size, count) = (u16_at(start, 54)?, u16_at(start, 56)?);
    if usize::from(size) != SEGMENT {
        return Err(NotACore);
    }
    // Physical address, offset in the file, length.
    let mut segments = Vec::new();
    for index in 0..usize::from(count) {
        let at = table.checked_add(index * SEGMENT).ok_or(NotACore)?;
        if start.get(at..).is_none_or(|rest| rest.len() < SEGMENT) {
            return Err(NotACore);
        }
        let (offset, address) = (u64_at(start, at + 8)?, u64_at(start, at + 24)?);
        let length = u64_at(start, at + 32)?;
        if u32_at(start, at)? == PT_LOAD && address != NO_ADDRESS && length > 0 {
            let ends = (address.checked_add(length), offset.checked_add(length));
            if matches!(ends, (Some(_), Some(_))) {
                segments.push((address, offset, length));
            }
        }
    }
    segments.sort_unstable();
    let mut runs = Vec::new();
    let mut seen_to = 0;
    for (address, offset, length) in segments {
        let fresh_from = address.max(seen_to);
        let end = address + length;
        if fresh_from < end {
            runs.push(offset + (fresh_from - address)..offset + length);
            seen_to = end;
        }
    }
    Ok(runs)
}

fn bytes<const N: usize>(of: &[u8], at: usize) -> Result<[u8; N], NotACore> {
    let field = of.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().ok_or(NotACore)
}

fn u16_at(of: &[u8], at: usize) -> Result<u16, NotACore> {
    bytes(of, at).map(u16::from_le_bytes)
}

fn u32_at(of: &[u8], at: usize) -> Result<u32, NotACore> {
    bytes(of, at).map(u32::from_le_bytes)
}

fn u64_at(of: &[u8], at: usize) -> Result<u64, NotACore> {
    bytes(of, at).map(u64::from_le_bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A core file's beginning with segments of (type, offset, physical address, length).
    pub(in crate::memory) fn core(segments: &[(u32, u64, u64, u64)]) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        file.resize(HEADER, 0);
        file[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        file[54..56].copy_from_slice(&(SEGMENT as u16).to_le_bytes());
        file[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
        for (kind, offset, address, length) in segments {
            let mut segment = [0; SEGMENT];
            segment[0..4].copy_from_slice(&kind.to_le_bytes());
            segment[8..16].copy_from_slice(&offset.to_le_bytes());
            segment[24..32].copy_from_slice(&address.to_le_bytes());
            segment[32..40].copy_from_slice(&length.to_le_bytes());
            file.extend(segment);
        }
        file
    }

    #[test]
    fn memory_is_found_once_and_by_address() {
        let file = core(&[
            (4, 0, 0, 100),                   // notes
            (PT_LOAD, 9000, NO_ADDRESS, 500), // mappings of the kernel
            (PT_LOAD, 7000, 0x3000, 0x1000),  // its text, which lies in the next one
            (PT_LOAD, 5000, 0x2000, 0x8000),
            (PT_LOAD, 1000, 0, 0x1000),
            (PT_LOAD, 3000, 0x9000, 0x2000), // overlaps the end of the one before
        ]);
        let expected = [
            1000..1000 + 0x1000,
            5000..5000 + 0x8000,
            3000 + 0x1000..3000 + 0x2000,
        ];
        assert_eq!(runs(&file).unwrap(), expected);
    }

    #[test]
    fn other_and_truncated_files_are_refused() {
        let file = core(&[(PT_LOAD, 0, 0, 1)]);
        for length in 0..file.len() {
            assert!(runs(&file[..length]).is_err(), "cut at {length}");
        }
        let mut big_endian = file.clone();
        big_endian[5] = 2;
        assert_eq!(runs(&big_endian), Err(NotACore));
        // Lengths that overflow are no memory.
        assert_eq!(runs(&core(&[(PT_LOAD, u64::MAX, 1, u64::MAX)])), Ok(vec![]));
    }
}
