//! The sums of a `memory.data` that is not encoded, while it is written front to back.

use crate::build_id::BuildId;
use crate::checksum::{append_zeros, crc32c_append};
use crate::encoding::Encoding;
use crate::sums::{CHUNK_BYTES, encode_sums};

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
    pub(crate) fn append(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(self.room()).expect("a chunk is small");
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.crc = crc32c_append(self.crc, now);
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
        encode_sums(build_id, Encoding::Raw, self.data_bytes, &entries)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checksum::crc32c;
    use crate::sums::DataSums;

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
        assert_eq!(sums.sums()[0], crc32c(&vec![7; 262_144]));
        assert_eq!(sums.chunk_len(1), 300_000 - 262_144);
    }
}
