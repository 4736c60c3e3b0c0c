//! A guest of a few instructions, to see whether guests run at all.
//!
//! Cloud Hypervisor enters a kernel as PVH says: in 32-bit protected mode with flat segments and
//! no paging, at the address that an ELF note names.
//!
//! Source: elf(5); `include/xen/interface/elfnote.h` and `xen/include/public/arch-x86/hvm/start_info.h`
//! of Xen 4.19.

/// Where it is loaded, and begins.
const BASE: u64 = 0x10_0000;
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;

/// What it prints, over and over.
pub(super) const SAYS: &str = "thaw probe";

/// An ELF file that goes on printing [`SAYS`] on the serial port.
pub(super) fn elf() -> Vec<u8> {
    let mut code = vec![0x66, 0xBA, 0xF8, 0x03]; // mov dx, 0x3f8
    let line = code.len();
    for byte in SAYS.bytes().chain(*b"\n") {
        code.extend_from_slice(&[0xB0, byte, 0xEE]); // mov al, byte; out dx, al
    }
    code.extend_from_slice(&[
        0xB9, 0x00, 0x00, 0x01, 0x00, // mov ecx, 0x10000
        0x49, // wait: dec ecx
        0x75, 0xFD, // jnz wait
        0xE9, // jmp line
    ]);
    let back = line as i32 - (code.len() as i32 + 4);
    code.extend_from_slice(&back.to_le_bytes());
    elf_around(&code)
}

/// An ELF file with one segment at 1 MiB, entered in 32-bit mode at its start.
#[must_use]
pub fn elf_around(code: &[u8]) -> Vec<u8> {
    let note = note();
    let note_at = ELF_HEADER + 2 * PROGRAM_HEADER;
    let code_at = note_at + note.len();
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Executable, x86-64, version 1.
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry; program headers follow this one; no section headers; no flags.
    for word in [BASE, ELF_HEADER as u64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&[0; 4]);
    for half in [ELF_HEADER, PROGRAM_HEADER, 2, 0, 0, 0] {
        file.extend_from_slice(&(half as u16).to_le_bytes());
    }
    let mut header = |kind: u32, flags: u32, words: [u64; 6]| {
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&flags.to_le_bytes());
        for word in words {
            file.extend_from_slice(&word.to_le_bytes());
        }
    };
    // PT_LOAD, readable, writable and executable; PT_NOTE, readable.
    let (from, len) = (code_at as u64, code.len() as u64);
    header(1, 7, [from, BASE, BASE, len, len, 0x1000]);
    let (from, len) = (note_at as u64, note.len() as u64);
    header(4, 4, [from, 0, 0, len, len, 4]);
    file.extend_from_slice(&note);
    file.extend_from_slice(code);
    file
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

    #[test]
    fn segment_and_note_lie_where_their_headers_say() {
        let elf = elf();
        let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
        let (load, note) = (ELF_HEADER, ELF_HEADER + PROGRAM_HEADER);
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
