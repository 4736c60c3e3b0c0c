//! How far a merge got: a file that only grows, and that says which of its ends are whole.
//!
//! ```text
//! offset size  field
//!      0    8  magic              "THAWMRG" and a zero byte
//!      8    4  format version     1
//!     12    4  chunk size         that of the sums below
//!     16   16  build id           of the merged build
//!     32   16  source id          the build whose memory is merged
//!     48    4  source map CRC     bytes 124 to 127 of its memory.map
//!     52    4  encoding           of memory.data
//!     56    4  zeros
//!     60    4  masked CRC of bytes 0 to 59
//!  then records, each after an fsync of memory.data:
//!      0    4  N                  chunks written since the record before; at least 1
//!      4 12·N  of each: stored length, CRC of the stored bytes, CRC of the content
//! 4+12·N    4  masked CRC of the record up to here
//! ```
//!
//! A record that is cut short or fails its checksum ends the journal.

use crate::build_id::BuildId;
use crate::checksum::masked;
use crate::encoding::Encoding;
use crate::le::{bytes_at, u32_at};
use crate::map_header::FORMAT_VERSION;
use crate::memory_map::MemoryMap;
use crate::stored_chunk::{STORED_CHUNK_BYTES, StoredChunk};
use crate::sums::CHUNK_BYTES;

const MAGIC: [u8; 8] = *b"THAWMRG\0";
const HEADER_BYTES: usize = 64;

/// Which memory is merged into which build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MergeIdentity {
    pub(crate) build_id: BuildId,
    source: BuildId,
    source_map_crc: u32,
    pub(crate) encoding: Encoding,
}

/// What a journal says is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Journal {
    /// The chunks of `memory.data`, from its beginning.
    pub(crate) chunks: Vec<StoredChunk>,
    /// Where the next record goes.
    pub(crate) bytes: u64,
}

impl MergeIdentity {
    pub(crate) fn new(build_id: BuildId, source: &MemoryMap, encoding: Encoding) -> Self {
        Self {
            build_id,
            source: source.build_id(),
            source_map_crc: source.header_crc(),
            encoding,
        }
    }

    /// The beginning of a journal.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        header.extend_from_slice(&CHUNK_BYTES.to_le_bytes());
        header.extend_from_slice(self.build_id.as_bytes());
        header.extend_from_slice(self.source.as_bytes());
        header.extend_from_slice(&self.source_map_crc.to_le_bytes());
        header.extend_from_slice(&self.encoding.code().to_le_bytes());
        header.resize(HEADER_BYTES - 4, 0);
        header.extend_from_slice(&masked(&header).to_le_bytes());
        header
    }
}

/// A record.
pub(crate) fn encode_record(chunks: &[StoredChunk]) -> Vec<u8> {
    let count = u32::try_from(chunks.len()).expect("16 TiB are 2^26 chunks");
    let mut record = Vec::with_capacity(8 + STORED_CHUNK_BYTES * chunks.len());
    record.extend_from_slice(&count.to_le_bytes());
    chunks
        .iter()
        .for_each(|chunk| record.extend_from_slice(&chunk.encode()));
    record.extend_from_slice(&masked(&record).to_le_bytes());
    record
}

impl Journal {
    /// What a file says about this merge; `None` if it is not a journal of it.
    pub(crate) fn decode(bytes: &[u8], identity: &MergeIdentity) -> Option<Self> {
        let mut rest = bytes.strip_prefix(identity.encode().as_slice())?;
        let mut chunks = Vec::new();
        while let Some((record, behind)) = split_record(rest) {
            chunks.extend(record.as_chunks().0.iter().map(StoredChunk::decode));
            rest = behind;
        }
        let bytes = (bytes.len() - rest.len()) as u64;
        Some(Self { chunks, bytes })
    }

    /// The build that a journal's source is, whatever the merge; `None` if it is no journal.
    pub(crate) fn source(bytes: &[u8]) -> Option<BuildId> {
        let header = bytes.first_chunk::<HEADER_BYTES>()?;
        let whole = header[..8] == MAGIC && u32_at(header, 60) == masked(&header[..60]);
        whole.then(|| BuildId::from_bytes(bytes_at(header, 32)))
    }
}

/// The chunks of the first record, and what is behind it.
fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let count = u32::from_le_bytes(*bytes.first_chunk()?) as usize;
    let covered = count.checked_mul(STORED_CHUNK_BYTES)?.checked_add(4)?;
    let (record, rest) = bytes.split_at_checked(covered)?;
    let (stored, behind) = rest.split_first_chunk()?;
    let whole = count > 0 && u32::from_le_bytes(*stored) == masked(record);
    whole.then_some((&record[4..], behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(number: u8) -> MergeIdentity {
        MergeIdentity {
            build_id: BuildId::from_bytes([number; 16]),
            source: BuildId::from_bytes([9; 16]),
            source_map_crc: 77,
            encoding: Encoding::Lz4,
        }
    }

    fn chunks(numbers: &[u32]) -> Vec<StoredChunk> {
        let chunk = |&number| StoredChunk {
            bytes: number,
            stored_crc: number * 10,
            content_crc: number * 100,
        };
        numbers.iter().map(chunk).collect()
    }

    #[test]
    fn journal_cut_or_damaged_anywhere_keeps_its_whole_records() {
        let header = identity(1).encode();
        let (first, second) = (
            encode_record(&chunks(&[1, 2, 3])),
            encode_record(&chunks(&[4])),
        );
        let good = [header.as_slice(), &first, &second].concat();
        let ends = [header.len(), header.len() + first.len(), good.len()];
        let expected = |whole: usize| match ends.iter().rposition(|&end| end <= whole)? {
            0 => Some(vec![]),
            1 => Some(chunks(&[1, 2, 3])),
            _ => Some(chunks(&[1, 2, 3, 4])),
        };
        for length in 0..=good.len() {
            let journal = Journal::decode(&good[..length], &identity(1));
            assert_eq!(journal.map(|j| j.chunks), expected(length), "{length}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            let journal = Journal::decode(&bad, &identity(1));
            assert_eq!(journal.map(|j| j.chunks), expected(at), "{at}");
        }
    }

    #[test]
    fn journal_of_another_merge_is_none() {
        let good = identity(1).encode();
        assert_eq!(Journal::source(&good), Some(BuildId::from_bytes([9; 16])));
        assert_eq!(Journal::decode(&good, &identity(2)), None);
    }
}
