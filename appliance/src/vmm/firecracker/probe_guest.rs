//! The guest of a probe as Firecracker enters it: in 64-bit mode, with the first GiB mapped to
//! itself.
//!
//! Source: `src/vmm/src/arch/x86_64` of Firecracker 1.17.

use crate::vmm::probe_guest::{Segment, code, elf as elf_of};

/// An ELF file that goes on printing what is waited for.
pub(super) fn elf() -> Vec<u8> {
    elf_around(&code())
}

/// An ELF file with one segment at 1 MiB, entered in 64-bit mode at its start, with the first GiB
/// mapped to itself.
#[must_use]
pub fn elf_around(code: &[u8]) -> Vec<u8> {
    elf_of(&[Segment::Code(code)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::probe_guest::{BASE, ELF_HEADER};

    #[test]
    fn the_segment_lies_where_its_header_says() {
        let elf = elf();
        let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
        assert_eq!(word(24), BASE);
        assert_eq!(word(32), ELF_HEADER as u64);
        let (offset, len) = (
            word(ELF_HEADER + 8) as usize,
            word(ELF_HEADER + 32) as usize,
        );
        assert_eq!(elf.len(), offset + len);
        assert_eq!(elf[offset..offset + 2], [0x66, 0xBA]);
        // The last jump goes back to the first letter.
        let back = i32::from_le_bytes(elf[elf.len() - 4..].try_into().unwrap());
        assert_eq!(elf.len() as i64 + i64::from(back), offset as i64 + 4);
    }
}
