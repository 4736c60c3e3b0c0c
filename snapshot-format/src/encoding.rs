//! How the chunks of a `memory.data` are stored: as they are, or compressed one by one.
//!
//! A chunk that compressing would not shrink is stored as it is; its length says so.

use std::fmt;

/// How chunks are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// As they are: every page can be read, and mapped, where the map says.
    #[default]
    Raw,
    /// LZ4 blocks: quick to decode.
    Lz4,
    /// Zstandard frames: small.
    Zstd,
}

/// Level 3 is where zstd's speed and size are in balance, and its own default.
const ZSTD_LEVEL: i32 = 3;

/// Encodes chunks, keeping what that needs between them.
pub(crate) struct Encoder {
    encoding: Encoding,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Encoding {
    /// The number in a file.
    pub(crate) const fn code(self) -> u32 {
        match self {
            Self::Raw => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    /// The encoding of a number, if this version knows it.
    pub(crate) const fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::Raw),
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Decodes a chunk into a buffer of exactly its length. Whatever `stored` is, nothing happens
    /// but that this fails: then the buffer holds anything, and `None` is returned.
    pub(crate) fn decode(self, stored: &[u8], chunk: &mut [u8]) -> Option<()> {
        if stored.len() == chunk.len() {
            chunk.copy_from_slice(stored);
            return Some(());
        }
        let length = match self {
            Self::Raw => None,
            Self::Lz4 => lz4_flex::block::decompress_into(stored, chunk).ok(),
            Self::Zstd => zstd::bulk::decompress_to_buffer(stored, chunk).ok(),
        };
        (length? == chunk.len()).then_some(())
    }
}

impl Encoder {
    pub(crate) fn new(encoding: Encoding) -> Self {
        let zstd = (encoding == Encoding::Zstd).then(|| {
            zstd::bulk::Compressor::new(ZSTD_LEVEL).expect("zstd has the level it has by default")
        });
        Self { encoding, zstd }
    }

    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Appends a chunk, encoded or as it is, whichever is shorter.
    pub(crate) fn append(&mut self, chunk: &[u8], to: &mut Vec<u8>) {
        let start = to.len();
        // No more room than what would be worth it: that it doesn't fit says the same.
        let room = chunk.len().saturating_sub(1);
        to.resize(start + room, 0);
        let buffer = &mut to[start..];
        let encoded = match (self.encoding, &mut self.zstd) {
            (Encoding::Lz4, _) => lz4(chunk, buffer),
            (Encoding::Zstd, Some(zstd)) => zstd.compress_to_buffer(chunk, buffer).ok(),
            _ => None,
        };
        match encoded {
            Some(length) => to.truncate(start + length),
            None => {
                to.truncate(start);
                to.extend_from_slice(chunk);
            }
        }
    }
}

/// LZ4 is only sure to fit a buffer of its worst case.
fn lz4(chunk: &[u8], buffer: &mut [u8]) -> Option<usize> {
    let mut whole = vec![0; lz4_flex::block::get_maximum_output_size(chunk.len())];
    let length = lz4_flex::block::compress_into(chunk, &mut whole).ok()?;
    buffer.get_mut(..length)?.copy_from_slice(&whole[..length]);
    Some(length)
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder")
            .field("encoding", &self.encoding)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [Encoding; 3] = [Encoding::Raw, Encoding::Lz4, Encoding::Zstd];

    fn chunk() -> impl Strategy<Value = Vec<u8>> {
        let noise = prop::collection::vec(any::<u8>(), 1..3000);
        let dull = (any::<u8>(), 1usize..30_000).prop_map(|(byte, length)| vec![byte; length]);
        prop_oneof![
            noise.clone(),
            dull.clone(),
            (noise, dull).prop_map(|(a, b)| [a, b].concat())
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn encoded_chunk_is_decoded_and_never_longer(chunk in chunk()) {
            for encoding in ALL {
                let mut stored = vec![9; 3];
                Encoder::new(encoding).append(&chunk, &mut stored);
                prop_assert!(stored.len() - 3 <= chunk.len());
                let mut decoded = vec![0; chunk.len()];
                prop_assert_eq!(encoding.decode(&stored[3..], &mut decoded), Some(()));
                prop_assert!(decoded == chunk);
            }
        }

        #[test]
        fn hostile_chunk_is_an_error_or_content(
            stored in prop::collection::vec(any::<u8>(), 0..300),
            length in 0usize..5000,
        ) {
            for encoding in ALL {
                let _ = encoding.decode(&stored, &mut vec![0; length]);
            }
        }
    }

    #[test]
    fn dull_chunk_is_stored_in_little() {
        for encoding in [Encoding::Lz4, Encoding::Zstd] {
            let mut stored = Vec::new();
            Encoder::new(encoding).append(&[7; 262_144], &mut stored);
            assert!(stored.len() < 2000, "{encoding}: {}", stored.len());
        }
    }
}
