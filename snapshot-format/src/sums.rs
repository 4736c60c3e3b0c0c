//! `memory.sums`: one checksum per chunk of `memory.data`.
//!
//! It is a file of its own because readers of pages need it only off the hot path, while the
//! map is needed before the first fault. Its header checksum covers the checksum of the
//! entries, so those four bytes identify all data of a build; maps record them for every build
//! they take pages from.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::build_id::BuildId;
use crate::checksum::{append_zeros, masked};
use crate::error::{Fault, FormatError};
use crate::le::{bytes_at, u32_at, u64_at};
use crate::map_header::FORMAT_VERSION;
use crate::units::MAX_MEMORY_BYTES;

pub(crate) const SUMS_MAGIC: [u8; 8] = *b"THAWSUM\0";
pub(crate) const SUMS_HEADER_BYTES: usize = 64;
/// The chunk that this crate's writers checksum.
pub const CHUNK_BYTES: u32 = 256 << 10;
const MIN_CHUNK_BYTES: u32 = 4 << 10;
const MAX_CHUNK_BYTES: u32 = 16 << 20;
/// Chunks hold the pages as they are; later versions may compress them.
const ENCODING_RAW: u32 = 0;

/// What the header of a `memory.sums` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumsHeader {
    /// The build whose data this is.
    pub build_id: BuildId,
    /// How many bytes one checksum covers; the last chunk may be shorter.
    pub chunk_bytes: u32,
    /// The length of `memory.data`.
    pub data_bytes: u64,
    /// The stored checksum of this header, which identifies the data.
    pub header_crc: u32,
    entries_crc: u32,
}

/// The checksums of one `memory.data`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSums {
    header: SumsHeader,
    sums: Vec<u32>,
}

impl SumsHeader {
    /// Reads and judges the header alone; 64 bytes, whatever the size of the data.
    ///
    /// # Errors
    /// [`FormatError::Io`], [`FormatError::Corrupt`] or [`FormatError::Unsupported`].
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(FormatError::io("Opening", path))?;
        let mut bytes = Vec::with_capacity(SUMS_HEADER_BYTES);
        file.take(SUMS_HEADER_BYTES as u64)
            .read_to_end(&mut bytes)
            .map_err(FormatError::io("Reading", path))?;
        Self::parse(&bytes, path)
    }

    fn parse(file_bytes: &[u8], file: &Path) -> Result<Self, FormatError> {
        let Some(bytes) = file_bytes.first_chunk::<SUMS_HEADER_BYTES>() else {
            let expected = format!("at least {SUMS_HEADER_BYTES}");
            return Err(Fault::new(file, 0, "sums length", expected, file_bytes.len()).into());
        };
        if bytes[..8] != SUMS_MAGIC {
            let (expected, found) = (
                format!("{SUMS_MAGIC:02x?}"),
                format!("{:02x?}", &bytes[..8]),
            );
            return Err(Fault::new(file, 0, "magic", expected, found).into());
        }
        for (at, what, known) in [
            (8, "format version", FORMAT_VERSION),
            (12, "encoding", ENCODING_RAW),
        ] {
            let found = u32_at(bytes, at);
            if found != known {
                let (file, found) = (file.to_owned(), found.into());
                return Err(FormatError::Unsupported { file, what, found });
            }
        }
        let (stored, computed) = (u32_at(bytes, 60), masked(&bytes[..60]));
        if stored != computed {
            return Err(Fault::checksum(file, 0, "header checksum", stored, computed).into());
        }
        let chunk_bytes = u32_at(bytes, 16);
        if !chunk_bytes.is_power_of_two()
            || !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&chunk_bytes)
        {
            let expected = "a power of two from 4 KiB to 16 MiB";
            return Err(Fault::new(file, 16, "chunk size", expected, chunk_bytes).into());
        }
        let data_bytes = u64_at(bytes, 24);
        if data_bytes > MAX_MEMORY_BYTES {
            let expected = format!("at most {MAX_MEMORY_BYTES}");
            return Err(Fault::new(file, 24, "data length", expected, data_bytes).into());
        }
        if u32_at(bytes, 20) != 0 || u64_at(bytes, 48) != 0 {
            return Err(Fault::new(file, 20, "reserved bytes", "zeros", "other bytes").into());
        }
        Ok(Self {
            build_id: BuildId::from_bytes(bytes_at(bytes, 32)),
            chunk_bytes,
            data_bytes,
            header_crc: stored,
            entries_crc: u32_at(bytes, 56),
        })
    }

    /// How many chunks the data has.
    pub fn chunk_count(&self) -> u64 {
        self.data_bytes.div_ceil(self.chunk_bytes.into())
    }
}

impl DataSums {
    /// Reads and judges a whole file.
    ///
    /// # Errors
    /// As for [`SumsHeader::open`].
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let bytes = std::fs::read(path).map_err(FormatError::io("Reading", path))?;
        Self::from_bytes(&bytes, path)
    }

    /// Judges a file that is in memory; `name` is what errors call it.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] or [`FormatError::Unsupported`].
    pub fn from_bytes(bytes: &[u8], name: &Path) -> Result<Self, FormatError> {
        let header = SumsHeader::parse(bytes, name)?;
        let expected = SUMS_HEADER_BYTES as u64 + 4 * header.chunk_count();
        if bytes.len() as u64 != expected {
            return Err(Fault::new(name, 0, "sums length", expected, bytes.len()).into());
        }
        let entries = &bytes[SUMS_HEADER_BYTES..];
        let (stored, computed) = (header.entries_crc, masked(entries));
        if stored != computed {
            let at = SUMS_HEADER_BYTES as u64;
            return Err(Fault::checksum(name, at, "entries checksum", stored, computed).into());
        }
        let sums = entries.as_chunks().0.iter().map(|&e| u32::from_le_bytes(e));
        Ok(Self {
            header,
            sums: sums.collect(),
        })
    }

    /// The header.
    pub fn header(&self) -> &SumsHeader {
        &self.header
    }

    /// The plain CRC-32C of each chunk.
    pub fn sums(&self) -> &[u32] {
        &self.sums
    }

    /// The length of a chunk: the last may be shorter than the others.
    pub fn chunk_len(&self, chunk: usize) -> u64 {
        let size = u64::from(self.header.chunk_bytes);
        self.header
            .data_bytes
            .saturating_sub(chunk as u64 * size)
            .min(size)
    }
}

/// Sums that grow while the data is written, front to back.
#[derive(Debug, Default)]
pub(crate) struct SumsBuilder {
    sums: Vec<u32>,
    crc: u32,
    /// Bytes in the chunk that is not complete yet.
    filled: u64,
    data_bytes: u64,
}

impl SumsBuilder {
    /// Goes on behind whole chunks.
    pub(crate) fn resume(sums: Vec<u32>) -> Self {
        Self {
            data_bytes: sums.len() as u64 * u64::from(CHUNK_BYTES),
            sums,
            ..Self::default()
        }
    }

    /// The sums of the chunks that are whole.
    pub(crate) fn complete(&self) -> &[u32] {
        &self.sums
    }

    pub(crate) fn append(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(self.room()).expect("a chunk is small");
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.crc = crc32c::crc32c_append(self.crc, now);
            self.advance(now.len() as u64);
            bytes = later;
        }
    }

    pub(crate) fn append_zeros(&mut self, mut zeros: u64) {
        let whole = append_zeros(0, CHUNK_BYTES.into());
        while zeros > 0 {
            let now = zeros.min(self.room());
            let whole_chunk = now == u64::from(CHUNK_BYTES);
            self.crc = if whole_chunk {
                whole
            } else {
                append_zeros(self.crc, now)
            };
            self.advance(now);
            zeros -= now;
        }
    }

    fn room(&self) -> u64 {
        u64::from(CHUNK_BYTES) - self.filled
    }

    fn advance(&mut self, bytes: u64) {
        self.filled += bytes;
        self.data_bytes += bytes;
        if self.room() == 0 {
            self.end_chunk();
        }
    }

    fn end_chunk(&mut self) {
        self.sums.push(self.crc);
        self.crc = 0;
        self.filled = 0;
    }

    /// The length of the data so far.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// The file, and the header checksum that identifies the data.
    pub(crate) fn finish(mut self, build_id: BuildId) -> (Vec<u8>, u32) {
        if self.filled > 0 {
            self.end_chunk();
        }
        let entries: Vec<u8> = self.sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        let mut file = Vec::with_capacity(SUMS_HEADER_BYTES + entries.len());
        file.extend_from_slice(&SUMS_MAGIC);
        file.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        file.extend_from_slice(&ENCODING_RAW.to_le_bytes());
        file.extend_from_slice(&CHUNK_BYTES.to_le_bytes());
        file.extend_from_slice(&[0; 4]);
        file.extend_from_slice(&self.data_bytes.to_le_bytes());
        file.extend_from_slice(build_id.as_bytes());
        file.extend_from_slice(&[0; 8]);
        file.extend_from_slice(&masked(&entries).to_le_bytes());
        let header_crc = masked(&file);
        file.extend_from_slice(&header_crc.to_le_bytes());
        file.extend_from_slice(&entries);
        (file, header_crc)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_that_were_skipped_sum_like_zeros_that_were_read() {
        let id = BuildId::from_bytes([1; 16]);
        let (mut read, mut skipped) = (SumsBuilder::default(), SumsBuilder::default());
        for zeros in [4096, 262_144, 700_000, 3] {
            read.append(b"data");
            read.append(&vec![0; zeros]);
            skipped.append(b"data");
            skipped.append_zeros(zeros as u64);
        }
        assert_eq!(read.finish(id), skipped.finish(id));
    }

    #[test]
    fn written_sums_are_read_back() {
        let mut builder = SumsBuilder::default();
        builder.append(&vec![7; 300_000]);
        let (file, crc) = builder.finish(BuildId::from_bytes([1; 16]));
        let sums = DataSums::from_bytes(&file, Path::new("sums")).unwrap();
        assert_eq!(sums.header().header_crc, crc);
        assert_eq!(sums.sums().len(), 2);
        assert_eq!(sums.sums()[0], crc32c::crc32c(&vec![7; 262_144]));
        assert_eq!(sums.chunk_len(1), 300_000 - 262_144);
    }
}
