//! What `memory.sums` says about one encoded chunk, and where all of them are.
//!
//! ```text
//!  0          4          8          12
//!  +----------+----------+----------+
//!  |  length  |  stored  | content  |   of the stored bytes; their CRC; the CRC of the content
//!  +----------+----------+----------+
//! ```

use crate::le::u32_at;

/// The size of an entry.
pub(crate) const STORED_CHUNK_BYTES: usize = 12;

/// One chunk, as it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoredChunk {
    /// The length of the stored bytes; that of the chunk if it is stored as it is.
    pub(crate) bytes: u32,
    /// The CRC-32C of the stored bytes.
    pub(crate) stored_crc: u32,
    /// The CRC-32C of the chunk.
    pub(crate) content_crc: u32,
}

impl StoredChunk {
    pub(crate) fn encode(&self) -> [u8; STORED_CHUNK_BYTES] {
        let mut entry = [0; STORED_CHUNK_BYTES];
        for (field, value) in
            entry
                .as_chunks_mut()
                .0
                .iter_mut()
                .zip([self.bytes, self.stored_crc, self.content_crc])
        {
            *field = value.to_le_bytes();
        }
        entry
    }

    pub(crate) fn decode(entry: &[u8; STORED_CHUNK_BYTES]) -> Self {
        Self {
            bytes: u32_at(entry, 0),
            stored_crc: u32_at(entry, 4),
            content_crc: u32_at(entry, 8),
        }
    }
}

/// Where each chunk begins in `memory.data`, and at last where the file ends.
pub(crate) fn offsets(chunks: &[StoredChunk]) -> Vec<u64> {
    let mut offsets = Vec::with_capacity(chunks.len() + 1);
    let mut at = 0;
    offsets.push(at);
    for chunk in chunks {
        // 2^26 chunks of at most 16 MiB are far below 2^64.
        at += u64::from(chunk.bytes);
        offsets.push(at);
    }
    offsets
}
