//! A guest of a few instructions, to see whether guests run at all.

/// Where Firecracker's guests may begin.
const BASE: u64 = 0x10_0000;
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// What it prints, over and over: Firecracker's own messages share its output, and may come in the
/// middle of a line.
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
        0xFF, 0xC9, // wait: dec ecx
        0x75, 0xFC, // jnz wait
        0xE9, // jmp line
    ]);
    let back = line as i32 - (code.len() as i32 + 4);
    code.extend_from_slice(&back.to_le_bytes());
    elf_around(&code)
}

/// An ELF file with one segment at 1 MiB, entered in 64-bit mode at its start, with the first GiB
/// mapped to itself. Source: elf(5); `src/vmm/src/arch/x86_64` of Firecracker 1.17.
#[must_use]
pub fn elf_around(code: &[u8]) -> Vec<u8> {
    let offset = ELF_HEADER + PROGRAM_HEADER;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Executable, x86-64, version 1.
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry; program headers follow this one; no section headers; no flags.
    for word in [BASE, ELF_HEADER as u64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&[0; 4]);
    for half in [ELF_HEADER, PROGRAM_HEADER, 1, 0, 0, 0] {
        file.extend_from_slice(&(half as u16).to_le_bytes());
    }
    // PT_LOAD, readable, writable and executable.
    file.extend_from_slice(&[1, 0, 0, 0, 7, 0, 0, 0]);
    let (from, len) = (offset as u64, code.len() as u64);
    for word in [from, BASE, BASE, len, len, 0x1000] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

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
