//! Reading parts of an encoded `memory.data`: only the chunks that hold them.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::checksum::crc32c;
use crate::encoding::Encoding;
use crate::error::{Fault, FormatError};
use crate::stored_chunk::{StoredChunk, offsets};
use crate::sums::{DataSums, SumsHeader};

/// Where the chunks of a file are, and what they have to be.
#[derive(Debug)]
pub(crate) struct ChunkTable {
    encoding: Encoding,
    chunk_bytes: u64,
    content_bytes: u64,
    chunks: Vec<StoredChunk>,
    /// One more than there are chunks.
    offsets: Vec<u64>,
}

impl ChunkTable {
    /// The table in the sums of which this is the header.
    pub(crate) fn open(path: &Path, header: &SumsHeader) -> Result<Self, FormatError> {
        let sums = DataSums::open(path)?;
        let (expected, found) = (header.header_crc, sums.header().header_crc);
        if expected != found {
            return Err(Fault::checksum(path, 0, "sums", expected, found).into());
        }
        let chunks = sums.into_stored();
        Ok(Self {
            encoding: header.encoding,
            chunk_bytes: header.chunk_bytes.into(),
            content_bytes: header.data_bytes,
            offsets: offsets(&chunks),
            chunks,
        })
    }

    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The length of the file.
    pub(crate) fn stored_bytes(&self) -> u64 {
        *self.offsets.last().expect("the end is the last offset")
    }

    /// Reads a part of the content.
    pub(crate) fn read(
        &self,
        file: &File,
        path: &Path,
        buffer: &mut [u8],
        at: u64,
    ) -> Result<(), FormatError> {
        let (mut at, mut rest) = (at, buffer);
        let (mut stored, mut content) = (Vec::new(), Vec::new());
        while !rest.is_empty() {
            let chunk = at / self.chunk_bytes;
            let bytes = self.content_range(chunk);
            let skip = in_memory(at - bytes.start);
            let length = in_memory(bytes.end - bytes.start);
            let part = rest.len().min(length - skip);
            let (now, later) = rest.split_at_mut(part);
            if part == length {
                self.read_chunk(file, path, chunk, &mut stored, now)?;
            } else {
                content.resize(length, 0);
                self.read_chunk(file, path, chunk, &mut stored, &mut content)?;
                now.copy_from_slice(&content[skip..skip + part]);
            }
            at += part as u64;
            rest = later;
        }
        Ok(())
    }

    /// The content of a chunk, which exists: the caller's range lies in the data.
    fn content_range(&self, chunk: u64) -> Range<u64> {
        let start = chunk * self.chunk_bytes;
        start..(start + self.chunk_bytes).min(self.content_bytes)
    }

    /// Decodes a chunk, after comparing it with its checksum.
    fn read_chunk(
        &self,
        file: &File,
        path: &Path,
        chunk: u64,
        stored: &mut Vec<u8>,
        content: &mut [u8],
    ) -> Result<(), FormatError> {
        let chunk = in_memory(chunk);
        let (at, entry) = (self.offsets[chunk], self.chunks[chunk]);
        stored.resize(entry.bytes as usize, 0);
        file.read_exact_at(stored, at)
            .map_err(FormatError::io("Reading", path))?;
        check_stored(path, at, &entry, self.encoding, stored, content).map_err(FormatError::from)
    }
}

/// Decodes the stored bytes of a chunk; `at` is where they are. Compares them and the content
/// with the checksums.
pub(crate) fn check_stored(
    path: &Path,
    at: u64,
    entry: &StoredChunk,
    encoding: Encoding,
    stored: &[u8],
    content: &mut [u8],
) -> Result<(), Fault> {
    let (expected, found) = (entry.stored_crc, crc32c(stored));
    if expected != found {
        return Err(Fault::checksum(path, at, "data chunk", expected, found));
    }
    if encoding.decode(stored, content).is_none() {
        let expected = format!("{} bytes of {encoding}", content.len());
        return Err(Fault::new(
            path,
            at,
            "data chunk",
            expected,
            "something else",
        ));
    }
    let (expected, found) = (entry.content_crc, crc32c(content));
    if expected != found {
        let what = "content of data chunk";
        return Err(Fault::checksum(path, at, what, expected, found));
    }
    Ok(())
}

fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a chunk, and the number of chunks, fit memory")
}
