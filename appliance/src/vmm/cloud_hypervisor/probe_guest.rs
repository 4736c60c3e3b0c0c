//! The guest of a probe as Cloud Hypervisor enters it, which is as PVH says: in 32-bit protected mode
//! with flat segments and no paging, at the address that an ELF note names.
//!
//! Source: `include/xen/interface/elfnote.h` and `xen/include/public/arch-x86/hvm/start_info.h` of
//! Xen 4.19.

use crate::vmm::probe_guest::{BASE, Segment, code, elf as elf_of};

/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;

/// An ELF file that goes on printing what is waited for.
pub(super) fn elf() -> Vec<u8> {
    elf_around(&code())
}

/// An ELF file with one segment at 1 MiB, entered in 32-bit mode at its start.
#[must_use]
pub fn elf_around(code: &[u8]) -> Vec<u8> {
    // The note first, which has to be aligned.
    elf_of(&[Segment::Note(&note()), Segment::Code(code)])
}

/// Where to enter.
fn note() -> Vec<u8> {
    let mut note = Vec::new();
    // Length of the name, of the address, and which note it is.
    for word in [4, 8, PHYS32_ENTRY] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&BASE.to_le_bytes());
    note
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::probe_guest::{ELF_HEADER, PROGRAM_HEADER};

    #[test]
    fn segment_and_note_lie_where_their_headers_say() {
        let elf = elf();
        let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
        let (note, load) = (ELF_HEADER, ELF_HEADER + PROGRAM_HEADER);
        let (offset, len) = (word(load + 8) as usize, word(load + 32) as usize);
        assert_eq!(elf.len(), offset + len);
        assert_eq!(elf[offset..offset + 2], [0x66, 0xBA]);
        let note = word(note + 8) as usize;
        assert_eq!(elf[note + 12..note + 16], *b"Xen\0");
        assert_eq!(word(note + 16), BASE);
        // The last jump goes back to the first letter.
        let back = i32::from_le_bytes(elf[elf.len() - 4..].try_into().unwrap());
        assert_eq!(elf.len() as i64 + i64::from(back), offset as i64 + 4);
    }
}
