//! When a chain is worth merging: a pure function of what its map says and of the disk space it
//! takes.
//!
//! A long chain costs in three ways: an open file and a checksum header for each build it takes
//! pages from; space for pages that every map position has meanwhile replaced; and reads, because
//! whoever reads the memory chunk by chunk also reads what lies between the pages it needs.

use std::os::unix::fs::MetadataExt;

use serde::Serialize;

use crate::build::Build;
use crate::error::FormatError;
use crate::extent::Origin;
use crate::memory_map::MemoryMap;
use crate::sums::CHUNK_BYTES;
use crate::units::PageCount;

/// What a chain costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ChainCost {
    /// The builds that the map takes pages from, its own included.
    pub depth: usize,
    /// The disk space of their data, in bytes; holes take none.
    pub stored_bytes: u64,
    /// The size of the pages that some position of the map names.
    pub live_bytes: u64,
    /// The chunks that contain those pages, in bytes; at least `live_bytes`.
    pub touched_bytes: u64,
    /// Extents of the map.
    pub extents: usize,
}

/// What a chain may cost before it is merged. A limit is allowed; above it is too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergePolicy {
    /// The most builds.
    pub max_depth: usize,
    /// The most dead bytes, in percent of the stored ones.
    pub max_dead_percent: u64,
    /// So many dead bytes are never a reason.
    pub min_dead_bytes: u64,
    /// The most bytes in touched chunks, in percent of the live ones; 100 is the ideal.
    pub max_read_percent: u64,
}

/// Why a chain should be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum MergeReason {
    /// It takes pages from many builds.
    #[error("Pages come from {depth} builds, more than {limit}")]
    Depth {
        /// How many.
        depth: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// Much of what it stores is not referenced.
    #[error("{dead_bytes} of {stored_bytes} stored bytes are dead")]
    DeadBytes {
        /// Stored, and named by no position.
        dead_bytes: u64,
        /// Stored.
        stored_bytes: u64,
    },
    /// Reading it reads much else.
    #[error("Reading {live_bytes} bytes of pages reads {touched_bytes} bytes of chunks")]
    ReadAmplification {
        /// The pages that are referenced.
        live_bytes: u64,
        /// The chunks they are in.
        touched_bytes: u64,
    },
}

impl Default for MergePolicy {
    /// At most 64 builds, half of the space dead above 64 MiB, and reads of three times the
    /// pages.
    fn default() -> Self {
        Self {
            max_depth: 64,
            max_dead_percent: 50,
            min_dead_bytes: 64 << 20,
            max_read_percent: 300,
        }
    }
}

impl MergePolicy {
    /// The first limit that a chain is above; `None` if it may stay as it is.
    pub fn judge(&self, cost: &ChainCost) -> Option<MergeReason> {
        let percent = |part: u64, whole: u64| u128::from(part) * 100 / u128::from(whole.max(1));
        let &ChainCost {
            depth,
            stored_bytes,
            live_bytes,
            touched_bytes,
            ..
        } = cost;
        if depth > self.max_depth {
            let limit = self.max_depth;
            return Some(MergeReason::Depth { depth, limit });
        }
        let dead_bytes = cost.dead_bytes();
        if dead_bytes > self.min_dead_bytes
            && percent(dead_bytes, stored_bytes) > self.max_dead_percent.into()
        {
            return Some(MergeReason::DeadBytes {
                dead_bytes,
                stored_bytes,
            });
        }
        // One build is read once; merging it again would only pack it.
        let amplified = percent(touched_bytes, live_bytes) > self.max_read_percent.into();
        (depth > 1 && amplified).then_some(MergeReason::ReadAmplification {
            live_bytes,
            touched_bytes,
        })
    }
}

impl ChainCost {
    /// Stored bytes that no position of the map names.
    pub fn dead_bytes(&self) -> u64 {
        self.stored_bytes.saturating_sub(self.live_bytes)
    }

    /// What an opened build costs.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn of(build: &Build) -> Result<Self, FormatError> {
        let mut stored_bytes = 0;
        for data in build.data_files() {
            let metadata = data.file().metadata();
            let metadata = metadata.map_err(FormatError::io("Reading the size of", data.path()))?;
            stored_bytes += metadata.blocks() * 512;
        }
        Ok(Self::of_map(build.map(), stored_bytes))
    }

    /// What a map costs whose builds take so much disk space.
    pub fn of_map(map: &MemoryMap, stored_bytes: u64) -> Self {
        let page_bytes = map.page_size().bytes();
        let chunk = u64::from(CHUNK_BYTES);
        let mut touched: Vec<Touched> = map.builds().iter().map(|_| Touched::default()).collect();
        let mut live = PageCount::default();
        for extent in map.all_extents() {
            if let Origin::Build(origin) = extent.origin {
                live = live + extent.pages;
                let first = extent.storage.get() * page_bytes;
                let end = first + extent.pages.get() * page_bytes;
                touched[usize::from(origin)].touch(first / chunk, (end - 1) / chunk);
            }
        }
        let lengths = map
            .builds()
            .iter()
            .map(|build| build.data_pages.get() * page_bytes);
        let touched = touched.iter().zip(lengths);
        let touched_bytes = touched.map(|(touched, length)| touched.bytes(length)).sum();
        Self {
            depth: map.builds().len(),
            stored_bytes,
            live_bytes: live.get() * page_bytes,
            // Extents may share pages, so that there is more content than data.
            touched_bytes: u64::max(touched_bytes, live.get() * page_bytes),
            extents: map.extent_count(),
        }
    }
}

/// A set of chunks of one build.
#[derive(Debug, Default)]
struct Touched {
    words: Vec<u64>,
}

impl Touched {
    fn touch(&mut self, first: u64, last: u64) {
        let word = |chunk: u64| usize::try_from(chunk / 64).expect("16 TiB are 2^26 chunks");
        if self.words.len() <= word(last) {
            self.words.resize(word(last) + 1, 0);
        }
        (first..=last).for_each(|chunk| self.words[word(chunk)] |= 1 << (chunk % 64));
    }

    /// The size of the chunks, of data of this length.
    fn bytes(&self, length: u64) -> u64 {
        let chunk = u64::from(CHUNK_BYTES);
        let chunks: u64 = self
            .words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        // The last one may be shorter.
        let last = length / chunk;
        let word = usize::try_from(last / 64)
            .ok()
            .and_then(|word| self.words.get(word));
        let cut = word.is_some_and(|word| word >> (last % 64) & 1 == 1);
        chunks * chunk - if cut { chunk - length % chunk } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: ChainCost = ChainCost {
        depth: 64,
        stored_bytes: 1 << 30,
        live_bytes: 1 << 29,
        touched_bytes: 3 << 29,
        extents: 1,
    };

    #[test]
    fn chain_at_every_limit_stays() {
        assert_eq!(MergePolicy::default().judge(&COST), None);
        assert_eq!(MergePolicy::default().judge(&ChainCost::default()), None);
    }

    #[test]
    fn chain_above_a_limit_is_merged_for_that_reason() {
        let judge = |cost| MergePolicy::default().judge(&cost);
        let reason = judge(ChainCost { depth: 65, ..COST });
        let (depth, limit) = (65, 64);
        assert_eq!(reason, Some(MergeReason::Depth { depth, limit }));
        let reason = judge(ChainCost {
            live_bytes: 1 << 28,
            ..COST
        });
        assert_eq!(
            reason,
            Some(MergeReason::DeadBytes {
                dead_bytes: 3 << 28,
                stored_bytes: 1 << 30
            })
        );
        let touched_bytes = 4 << 29;
        let reason = judge(ChainCost {
            touched_bytes,
            ..COST
        });
        let live_bytes = 1 << 29;
        assert_eq!(
            reason,
            Some(MergeReason::ReadAmplification {
                live_bytes,
                touched_bytes
            })
        );
    }

    #[test]
    fn last_chunk_of_the_data_counts_as_long_as_it_is() {
        let mut touched = Touched::default();
        touched.touch(0, 1);
        let chunk = u64::from(CHUNK_BYTES);
        assert_eq!(touched.bytes(chunk + 4096), chunk + 4096);
        assert_eq!(touched.bytes(2 * chunk), 2 * chunk);
        assert_eq!(touched.bytes(9 * chunk + 1), 2 * chunk);
        touched.touch(64, 64);
        assert_eq!(touched.bytes(64 * chunk + 8192), 2 * chunk + 8192);
    }

    #[test]
    fn few_dead_bytes_are_no_reason_however_large_their_part() {
        let cost = ChainCost {
            stored_bytes: 64 << 20,
            live_bytes: 4096,
            touched_bytes: 8192,
            ..COST
        };
        assert_eq!(MergePolicy::default().judge(&cost), None);
    }

    #[test]
    fn costs_whose_products_exceed_64_bits_are_judged() {
        let cost = ChainCost {
            stored_bytes: u64::MAX,
            live_bytes: 1,
            touched_bytes: u64::MAX,
            ..COST
        };
        assert!(MergePolicy::default().judge(&cost).is_some());
    }
}
