//! A guest of a few instructions, to see whether guests run at all: what it does, and the file it
//! comes in. How a VMM enters it is its driver's to know.
//!
//! Source: elf(5).

/// Where it is loaded, and begins.
pub(super) const BASE: u64 = 0x10_0000;
pub(super) const ELF_HEADER: usize = 64;
pub(super) const PROGRAM_HEADER: usize = 56;

/// What it prints, over and over: a VMM's own messages may share its output, and come in the middle
/// of a line.
pub(super) const SAYS: &str = "thaw probe";

/// Goes on printing [`SAYS`] on the serial port, in 32-bit mode and in 64-bit mode.
pub(super) fn code() -> Vec<u8> {
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
    code
}

/// A part of an ELF file.
pub(super) enum Segment<'a> {
    /// Loaded at [`BASE`].
    Code(&'a [u8]),
    /// For whoever loads it.
    Note(&'a [u8]),
}

impl Segment<'_> {
    const fn bytes(&self) -> &[u8] {
        match self {
            Self::Code(bytes) | Self::Note(bytes) => bytes,
        }
    }

    /// Its header, if it begins at this place of the file.
    fn header(&self, offset: u64) -> Vec<u8> {
        // PT_LOAD, readable, writable and executable; PT_NOTE, readable.
        let (kind, flags, address, align): (u32, u32, _, _) = match self {
            Self::Code(_) => (1, 7, BASE, 0x1000),
            Self::Note(_) => (4, 4, 0, 4),
        };
        let mut header = Vec::with_capacity(PROGRAM_HEADER);
        header.extend_from_slice(&kind.to_le_bytes());
        header.extend_from_slice(&flags.to_le_bytes());
        let length = self.bytes().len() as u64;
        for word in [offset, address, address, length, length, align] {
            header.extend_from_slice(&word.to_le_bytes());
        }
        header
    }
}

/// An ELF file of these, entered at [`BASE`].
pub(super) fn elf(segments: &[Segment<'_>]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Executable, x86-64, version 1.
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry; program headers follow this one; no section headers; no flags.
    for word in [BASE, ELF_HEADER as u64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&[0; 4]);
    for half in [ELF_HEADER, PROGRAM_HEADER, segments.len(), 0, 0, 0] {
        file.extend_from_slice(&(half as u16).to_le_bytes());
    }
    let mut offset = ELF_HEADER + segments.len() * PROGRAM_HEADER;
    for segment in segments {
        file.extend(segment.header(offset as u64));
        offset += segment.bytes().len();
    }
    for segment in segments {
        file.extend_from_slice(segment.bytes());
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_jump_goes_back_to_the_first_letter() {
        let code = code();
        let back = i32::from_le_bytes(code[code.len() - 4..].try_into().unwrap());
        assert_eq!(code.len() as i64 + i64::from(back), 4);
        assert_eq!(code[4..6], [0xB0, b't']);
    }
}
