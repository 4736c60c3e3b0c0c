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
use crate::checksum::masked;
use crate::encoding::Encoding;
use crate::error::{Fault, FormatError};
use crate::le::{bytes_at, u32_at, u64_at};
use crate::map_header::FORMAT_VERSION;
use crate::stored_chunk::{STORED_CHUNK_BYTES, StoredChunk};
use crate::units::MAX_MEMORY_BYTES;

pub(crate) const SUMS_MAGIC: [u8; 8] = *b"THAWSUM\0";
pub(crate) const SUMS_HEADER_BYTES: usize = 64;
/// The chunk that this crate's writers checksum.
pub const CHUNK_BYTES: u32 = 256 << 10;
const MIN_CHUNK_BYTES: u32 = 4 << 10;
const MAX_CHUNK_BYTES: u32 = 16 << 20;

/// What the header of a `memory.sums` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumsHeader {
    /// The build whose data this is.
    pub build_id: BuildId,
    /// How many bytes one checksum covers; the last chunk may be shorter.
    pub chunk_bytes: u32,
    /// The length of the data; also that of `memory.data` if it is not encoded.
    pub data_bytes: u64,
    /// How the chunks are stored.
    pub encoding: Encoding,
    /// The stored checksum of this header, which identifies the data.
    pub header_crc: u32,
    entries_crc: u32,
}

/// The checksums of one `memory.data`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSums {
    header: SumsHeader,
    sums: Vec<u32>,
    /// Of each chunk, if they are encoded.
    stored: Vec<StoredChunk>,
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
        let unsupported = |what, found: u32| {
            let (file, found) = (file.to_owned(), found.into());
            FormatError::Unsupported { file, what, found }
        };
        let (version, encoding) = (u32_at(bytes, 8), u32_at(bytes, 12));
        if version != FORMAT_VERSION {
            return Err(unsupported("format version", version));
        }
        let encoding =
            Encoding::from_code(encoding).ok_or_else(|| unsupported("encoding", encoding))?;
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
            encoding,
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
        let entry_bytes = match header.encoding {
            Encoding::Raw => 4,
            Encoding::Lz4 | Encoding::Zstd => STORED_CHUNK_BYTES as u64,
        };
        let expected = SUMS_HEADER_BYTES as u64 + entry_bytes * header.chunk_count();
        if bytes.len() as u64 != expected {
            return Err(Fault::new(name, 0, "sums length", expected, bytes.len()).into());
        }
        let entries = &bytes[SUMS_HEADER_BYTES..];
        let (stored, computed) = (header.entries_crc, masked(entries));
        if stored != computed {
            let at = SUMS_HEADER_BYTES as u64;
            return Err(Fault::checksum(name, at, "entries checksum", stored, computed).into());
        }
        let mut sums = Self {
            header,
            sums: Vec::new(),
            stored: Vec::new(),
        };
        if header.encoding == Encoding::Raw {
            let raw = entries.as_chunks().0.iter();
            sums.sums = raw.map(|&entry| u32::from_le_bytes(entry)).collect();
        } else {
            let stored = entries.as_chunks().0.iter();
            sums.stored = stored.map(StoredChunk::decode).collect();
            sums.sums = sums.stored.iter().map(|chunk| chunk.content_crc).collect();
            sums.check_stored(name)?;
        }
        Ok(sums)
    }

    /// That every encoded chunk has some bytes, and no more than it has without encoding.
    fn check_stored(&self, name: &Path) -> Result<(), Fault> {
        for (number, chunk) in self.stored.iter().enumerate() {
            let most = self.chunk_len(number);
            if chunk.bytes == 0 || u64::from(chunk.bytes) > most {
                let at = (SUMS_HEADER_BYTES + number * STORED_CHUNK_BYTES) as u64;
                let expected = format!("1 to {most}");
                return Err(Fault::new(name, at, "chunk length", expected, chunk.bytes));
            }
        }
        Ok(())
    }

    /// The header.
    pub fn header(&self) -> &SumsHeader {
        &self.header
    }

    /// The length of `memory.data`.
    pub fn stored_bytes(&self) -> u64 {
        match self.header.encoding {
            Encoding::Raw => self.header.data_bytes,
            _ => self.stored.iter().map(|chunk| u64::from(chunk.bytes)).sum(),
        }
    }

    /// The encoded chunks; none if they are stored as they are.
    pub(crate) fn stored(&self) -> &[StoredChunk] {
        &self.stored
    }

    pub(crate) fn into_stored(self) -> Vec<StoredChunk> {
        self.stored
    }

    /// The plain CRC-32C of the content of each chunk.
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

/// The file for data of this length, and the header checksum that identifies the data.
pub(crate) fn encode_sums(
    build_id: BuildId,
    encoding: Encoding,
    data_bytes: u64,
    entries: &[u8],
) -> (Vec<u8>, u32) {
    let mut file = Vec::with_capacity(SUMS_HEADER_BYTES + entries.len());
    file.extend_from_slice(&SUMS_MAGIC);
    file.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    file.extend_from_slice(&encoding.code().to_le_bytes());
    file.extend_from_slice(&CHUNK_BYTES.to_le_bytes());
    file.extend_from_slice(&[0; 4]);
    file.extend_from_slice(&data_bytes.to_le_bytes());
    file.extend_from_slice(build_id.as_bytes());
    file.extend_from_slice(&[0; 8]);
    file.extend_from_slice(&masked(entries).to_le_bytes());
    let header_crc = masked(&file);
    file.extend_from_slice(&header_crc.to_le_bytes());
    file.extend_from_slice(entries);
    (file, header_crc)
}
