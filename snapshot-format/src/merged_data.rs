//! The `memory.data` of a merged build while it grows: encoded chunk by chunk, and summed.

use crate::build_id::BuildId;
use crate::checksum::crc32c;
use crate::encoding::{Encoder, Encoding};
use crate::stored_chunk::StoredChunk;
use crate::sums::{CHUNK_BYTES, encode_sums};

/// Chunks so far, and what encodes the next ones.
#[derive(Debug)]
pub(crate) struct MergedData {
    encoder: Encoder,
    chunks: Vec<StoredChunk>,
    /// The content of the chunks.
    content_bytes: u64,
    /// What of it is stored: where the next chunk goes.
    stored_bytes: u64,
    encoded: Vec<u8>,
}

impl MergedData {
    /// Goes on behind whole chunks.
    pub(crate) fn resume(encoding: Encoding, chunks: Vec<StoredChunk>) -> Self {
        Self {
            encoder: Encoder::new(encoding),
            content_bytes: chunks.len() as u64 * u64::from(CHUNK_BYTES),
            stored_bytes: chunks.iter().map(|chunk| u64::from(chunk.bytes)).sum(),
            chunks,
            encoded: Vec::new(),
        }
    }

    /// Appends whole chunks, the last of all excepted. Returns what to write, and where.
    pub(crate) fn append<'a>(&'a mut self, content: &'a [u8]) -> (u64, &'a [u8]) {
        let at = self.stored_bytes;
        let raw = self.encoder.encoding() == Encoding::Raw;
        self.encoded.clear();
        for chunk in content.chunks(CHUNK_BYTES as usize) {
            let content_crc = crc32c(chunk);
            let start = self.encoded.len();
            if !raw {
                self.encoder.append(chunk, &mut self.encoded);
            }
            let stored = if raw { chunk } else { &self.encoded[start..] };
            self.chunks.push(StoredChunk {
                bytes: u32::try_from(stored.len()).expect("a chunk is small"),
                stored_crc: if raw { content_crc } else { crc32c(stored) },
                content_crc,
            });
            self.stored_bytes += stored.len() as u64;
        }
        self.content_bytes += content.len() as u64;
        (at, if raw { content } else { &self.encoded })
    }

    pub(crate) fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    /// All chunks but a last one that is shorter.
    pub(crate) fn complete(&self) -> &[StoredChunk] {
        let whole = self.content_bytes / u64::from(CHUNK_BYTES);
        &self.chunks[..usize::try_from(whole).expect("chunks are counted in memory")]
    }

    /// The sums, and the header checksum that identifies the data.
    pub(crate) fn finish(&self, build_id: BuildId) -> (Vec<u8>, u32) {
        let encoding = self.encoder.encoding();
        let entries: Vec<u8> = if encoding == Encoding::Raw {
            let sums = self.chunks.iter().map(|chunk| chunk.content_crc);
            sums.flat_map(u32::to_le_bytes).collect()
        } else {
            self.chunks.iter().flat_map(StoredChunk::encode).collect()
        };
        encode_sums(build_id, encoding, self.content_bytes, &entries)
    }
}
