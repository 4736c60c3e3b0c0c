//! The copy-on-write file of a device-mapper snapshot, read without the kernel.
//!
//! ```text
//!  chunk 0      1          2 … 1+N      2+N        3+N …
//!  ┌────────┬──────────┬────────────┬──────────┬────────────
//!  │ header │ area 0   │ its data   │ area 1   │ its data …      N = chunk bytes / 16
//!  └────────┴──────────┴────────────┴──────────┴────────────
//!  header: "SnAp" (0x70416e53), valid, version, chunk size in sectors: u32 each, little-endian
//!  area:   N pairs (chunk of the disk, chunk of this file): u64 each; the first pair whose
//!          second number is 0 is the end
//! ```
//!
//! Source: Linux `drivers/md/dm-snap-persistent.c`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

/// Bytes that are copied when the first of them is written.
pub const CHUNK_BYTES: u64 = 4096;
/// The same in sectors, as the kernel's table takes it.
pub const CHUNK_SECTORS: u64 = CHUNK_BYTES / 512;

const MAGIC: u32 = 0x7041_6e53;
const VERSION: u32 = 1;
const PAIR_BYTES: u64 = 16;
/// The largest chunk that is read: what the kernel makes is far below.
const MAX_CHUNK_BYTES: u64 = 16 << 20;

/// Why a file is no copy-on-write file.
#[derive(Debug, Error)]
pub enum CowError {
    /// It can't be read.
    #[error("Reading a copy-on-write file at byte {at}")]
    Read {
        /// Where.
        at: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It says what no kernel writes.
    #[error("The copy-on-write file is corrupt: at byte {at}, expected {expected}, found {found}")]
    Corrupt {
        /// Where.
        at: u64,
        /// What should be there.
        expected: String,
        /// What is.
        found: u64,
    },
    /// The kernel has given it up.
    #[error(
        "The copy-on-write file is invalid: a write to it failed, and what it holds can't be used"
    )]
    Invalid,
}

/// A chunk of the disk that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Its offset in the disk.
    pub at: u64,
    /// Where its content is in the file.
    pub stored_at: u64,
}

/// What a copy-on-write file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// Bytes of each changed chunk.
    pub chunk_bytes: u64,
    /// In the order of their first write.
    pub changed: Vec<Changed>,
}

impl Changes {
    /// Reads the metadata; a file of zeros holds none.
    ///
    /// # Errors
    /// See [`CowError`].
    pub fn read(file: &File) -> Result<Self, CowError> {
        let end = file
            .metadata()
            .map_err(|source| CowError::Read { at: 0, source })?
            .len();
        let mut header = [0; 16];
        read(file, 0, &mut header)?;
        let field = |index: usize| {
            let bytes = header[4 * index..4 * index + 4].try_into();
            u32::from_le_bytes(bytes.expect("four bytes"))
        };
        let corrupt = |at, expected: String, found| CowError::Corrupt {
            at,
            expected,
            found,
        };
        match field(0) {
            // The kernel writes the header when the snapshot is first set up.
            0 => {
                return Ok(Self {
                    chunk_bytes: CHUNK_BYTES,
                    changed: Vec::new(),
                });
            }
            MAGIC => {}
            found => return Err(corrupt(0, format!("{MAGIC:#x}"), found.into())),
        }
        if field(1) == 0 {
            return Err(CowError::Invalid);
        }
        if field(2) != VERSION {
            return Err(corrupt(8, format!("version {VERSION}"), field(2).into()));
        }
        let chunk_bytes = u64::from(field(3)) * 512;
        if !chunk_bytes.is_power_of_two() || chunk_bytes > MAX_CHUNK_BYTES {
            return Err(corrupt(
                12,
                "a power of two of sectors".into(),
                field(3).into(),
            ));
        }
        let mut changes = Self {
            chunk_bytes,
            changed: Vec::new(),
        };
        let pairs = chunk_bytes / PAIR_BYTES;
        let mut area = vec![0; chunk_bytes as usize];
        for number in 0.. {
            let area_at = (1 + number * (pairs + 1)) * chunk_bytes;
            if area_at + chunk_bytes > end {
                break;
            }
            read(file, area_at, &mut area)?;
            if !changes.take(&area, area_at, end)? {
                break;
            }
        }
        Ok(changes)
    }

    /// Takes an area's pairs; says whether there may be another area.
    fn take(&mut self, area: &[u8], area_at: u64, end: u64) -> Result<bool, CowError> {
        for (index, pair) in area.chunks_exact(PAIR_BYTES as usize).enumerate() {
            let number = |at: usize| {
                let bytes = pair[at..at + 8].try_into();
                u64::from_le_bytes(bytes.expect("eight bytes"))
            };
            let (old, new) = (number(0), number(8));
            if new == 0 {
                return Ok(false);
            }
            let pair_at = area_at + index as u64 * PAIR_BYTES;
            let corrupt = |at, what: &str, found| CowError::Corrupt {
                at,
                expected: what.to_owned(),
                found,
            };
            let most = end / self.chunk_bytes;
            if new >= most {
                return Err(corrupt(pair_at + 8, &format!("a chunk below {most}"), new));
            }
            let Some(at) = old.checked_mul(self.chunk_bytes) else {
                return Err(corrupt(pair_at, "a chunk of a disk", old));
            };
            let stored_at = new * self.chunk_bytes;
            self.changed.push(Changed { at, stored_at });
        }
        Ok(true)
    }
}

/// How long a file has to be so that a disk of so many bytes can be written all over.
#[must_use]
pub fn bytes_for(disk_bytes: u64) -> u64 {
    let pairs = CHUNK_BYTES / PAIR_BYTES;
    let chunks = disk_bytes.div_ceil(CHUNK_BYTES);
    // The header, an area for each full set of pairs, and the next, which is prepared ahead.
    (1 + chunks + chunks.div_ceil(pairs) + 1) * CHUNK_BYTES
}

fn read(file: &File, at: u64, buffer: &mut [u8]) -> Result<(), CowError> {
    file.read_exact_at(buffer, at)
        .map_err(|source| CowError::Read { at, source })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Writes a file as the kernel would: `(chunk of the disk, its content)`.
    pub(crate) fn write(file: &File, changed: &[(u64, Vec<u8>)]) {
        let pairs = CHUNK_BYTES / PAIR_BYTES;
        let areas = changed.len() as u64 / pairs + 1;
        file.set_len((1 + areas * (pairs + 1)) * CHUNK_BYTES)
            .unwrap();
        let header = [MAGIC, 1, VERSION, CHUNK_SECTORS as u32].map(u32::to_le_bytes);
        file.write_all_at(&header.concat(), 0).unwrap();
        for (index, (old, content)) in changed.iter().enumerate() {
            let (area, slot) = (index as u64 / pairs, index as u64 % pairs);
            let area_chunk = 1 + area * (pairs + 1);
            let new = area_chunk + 1 + slot;
            let pair = [old.to_le_bytes(), new.to_le_bytes()].concat();
            let at = area_chunk * CHUNK_BYTES + slot * PAIR_BYTES;
            file.write_all_at(&pair, at).unwrap();
            file.write_all_at(content, new * CHUNK_BYTES).unwrap();
        }
    }

    #[test]
    fn changes_of_many_areas_are_read_in_order() {
        let file = tempfile::tempfile().unwrap();
        let changed: Vec<_> = (0..600).map(|n| (n * 3, vec![n as u8; 4096])).collect();
        write(&file, &changed);
        let changes = Changes::read(&file).unwrap();
        assert_eq!(changes.changed.len(), 600);
        for (found, (old, content)) in changes.changed.iter().zip(&changed) {
            assert_eq!(found.at, old * CHUNK_BYTES);
            let mut stored = vec![0; 4096];
            file.read_exact_at(&mut stored, found.stored_at).unwrap();
            assert_eq!(&stored, content);
        }
    }

    #[test]
    fn a_full_last_area_is_the_end() {
        let file = tempfile::tempfile().unwrap();
        let changed: Vec<_> = (0..256).map(|n| (n, vec![1; 4096])).collect();
        write(&file, &changed);
        // Cut before the next area.
        file.set_len((1 + 257) * CHUNK_BYTES).unwrap();
        assert_eq!(Changes::read(&file).unwrap().changed.len(), 256);
    }

    #[test]
    fn a_new_file_holds_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(Changes::read(&file).unwrap().changed.is_empty());
    }

    #[test]
    fn what_no_kernel_writes_is_refused_with_its_place() {
        let broken = |at: u64, bytes: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            write(&file, &[(7, vec![1; 4096])]);
            file.write_all_at(bytes, at).unwrap();
            Changes::read(&file).unwrap_err()
        };
        let text = broken(0, &[9]).to_string();
        assert!(text.contains("byte 0"), "{text}");
        assert!(matches!(broken(4, &[0]), CowError::Invalid));
        assert!(matches!(broken(8, &[2]), CowError::Corrupt { at: 8, .. }));
        assert!(matches!(broken(12, &[7]), CowError::Corrupt { at: 12, .. }));
        let second = broken(4096 + 8, &u64::MAX.to_le_bytes());
        assert!(
            matches!(second, CowError::Corrupt { at: 4104, .. }),
            "{second}"
        );
        let first = broken(4096, &u64::MAX.to_le_bytes());
        assert!(
            matches!(first, CowError::Corrupt { at: 4096, .. }),
            "{first}"
        );
        let short = tempfile::tempfile().unwrap();
        assert!(matches!(Changes::read(&short), Err(CowError::Read { .. })));
    }

    #[test]
    fn no_flipped_byte_of_the_metadata_leads_out_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        let changed: Vec<_> = (0..300).map(|n| (n * 7, vec![n as u8; 4096])).collect();
        write(&file, &changed);
        let end = file.metadata().unwrap().len();
        let area = 257 * CHUNK_BYTES + CHUNK_BYTES;
        for at in (0..32)
            .chain(CHUNK_BYTES..CHUNK_BYTES + 600)
            .chain(area..area + 600)
        {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            for flip in [0x01, 0x80, 0xff] {
                file.write_all_at(&[byte[0] ^ flip], at).unwrap();
                if let Ok(changes) = Changes::read(&file) {
                    let inside = |c: &Changed| c.stored_at + changes.chunk_bytes <= end;
                    assert!(changes.changed.iter().all(inside), "byte {at} ^ {flip:#x}");
                }
            }
            file.write_all_at(&byte, at).unwrap();
        }
        assert_eq!(Changes::read(&file).unwrap().changed.len(), 300);
    }

    #[test]
    fn a_file_for_a_whole_disk_has_room_for_its_metadata() {
        // 262,144 chunks of 4 KiB, 1,024 full areas, the header, one area ahead.
        assert_eq!(bytes_for(1 << 30), (262_144 + 1024 + 2) * 4096);
        assert_eq!(bytes_for(1), 4 * 4096);
    }
}
