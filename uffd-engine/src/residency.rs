//! What a worker knows about the page cache, so that it needn't ask for every fault.
//!
//! Asking the kernel (`mincore`) costs a tenth of a fault, for one page as for a chunk of 32. So a
//! worker asks for the whole chunk around a page, has what is there mapped, and believes the
//! answer for [`TRUSTED`]:
//!
//! ```text
//!   page ─▶ chunk known and fresh? ──yes──▶ its bits
//!                 │ no
//!                 └─▶ mincore of the chunk ─▶ map what is there ─▶ remember its bits
//! ```
//!
//! Why the worker doesn't wait for the disk all the same: what is in use gets mapped here, and
//! mapped pages are the last that reclaim takes, are skipped by `POSIX_FADV_DONTNEED` and by
//! other processes' `MADV_PAGEOUT`; truncation makes the copy an error. What is left is an
//! eviction within [`TRUSTED`] (or [`TRUSTED_MAPPED`]) of the answer. It would cost a wait, not correctness, and show:
//! the worker's major faults are counted ([`SessionStats`](crate::SessionStats)).
//!
//! Nothing is allocated after the start, and entries are overwritten, not searched for.

use std::time::{Duration, Instant};

use crate::source::{Location, PageSource};
use crate::sys::mapping::{CACHE_PAGE, CHUNK_BYTES, ChunkBits};

/// How long an answer is believed.
const TRUSTED: Duration = Duration::from_millis(40);
/// How long, when all of a chunk is mapped: then only reclaim takes it, and last.
const TRUSTED_MAPPED: Duration = Duration::from_millis(400);
/// Chunks remembered per worker: 512 MiB of sources in use at a time.
const ENTRIES: usize = 4096;

/// One answer, in one cache line.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Entry {
    /// No source has serial 0.
    source: u32,
    chunk: u32,
    file: u16,
    until: Instant,
    resident: ChunkBits,
}

const _: () = assert!(size_of::<Entry>() == 32);

/// The knowledge of one worker.
pub(crate) struct Residency {
    entries: Box<[Entry]>,
}

impl Default for Residency {
    fn default() -> Self {
        let nothing = Entry {
            source: 0,
            chunk: 0,
            file: 0,
            until: Instant::now(),
            resident: ChunkBits::default(),
        };
        Self {
            entries: vec![nothing; ENTRIES].into_boxed_slice(),
        }
    }
}

impl Residency {
    /// How many of `len` bytes at a location are in the page cache, without a gap.
    pub(crate) fn prefix(
        &mut self,
        source: &PageSource,
        at: Location,
        len: u64,
        now: Instant,
    ) -> u64 {
        let end = at.offset + len;
        let mut offset = at.offset;
        while offset < end {
            let chunk = offset / CHUNK_BYTES;
            let resident = self.chunk(source, at.file, chunk, now);
            let stop = end.min((chunk + 1) * CHUNK_BYTES);
            let wanted = (stop - offset).div_ceil(CACHE_PAGE);
            let first = (offset - chunk * CHUNK_BYTES) / CACHE_PAGE;
            let found = resident.run_from(first, wanted);
            if found < wanted {
                return offset - at.offset + found * CACHE_PAGE;
            }
            offset = stop;
        }
        len
    }

    fn chunk(&mut self, source: &PageSource, file: u16, chunk: u64, now: Instant) -> ChunkBits {
        // Neighbouring chunks of one file never collide, which is what is in use together.
        let spread = source.serial().wrapping_mul(0x9E37_79B9) >> 8;
        let place = (u64::from(spread) + u64::from(file) * 61 + chunk) as usize % ENTRIES;
        let entry = &mut self.entries[place];
        let key = (source.serial(), file, chunk as u32);
        if (entry.source, entry.file, entry.chunk) == key && entry.until > now {
            return entry.resident;
        }
        let resident = source.look_at_chunk(file, chunk);
        let trusted = if resident.is_full() {
            TRUSTED_MAPPED
        } else {
            TRUSTED
        };
        *entry = Entry {
            source: key.0,
            file: key.1,
            chunk: key.2,
            until: now + trusted,
            resident,
        };
        entry.resident
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot_format::PageSize;
    use std::io::Write;

    fn source(pages: u64) -> (tempfile::NamedTempFile, std::sync::Arc<PageSource>) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for page in 0..pages {
            file.write_all(&[page as u8; 4096]).unwrap();
        }
        file.as_file().sync_all().unwrap();
        let source = PageSource::open_plain(file.path(), PageSize::Size4K).unwrap();
        (file, source)
    }

    #[test]
    fn a_run_is_resident_across_chunks_and_ends_at_its_length() {
        let (_file, source) = source(600);
        let now = Instant::now();
        let mut known = Residency::default();
        let at = |page: u64| Location {
            file: 0,
            offset: page * 4096,
        };
        assert_eq!(known.prefix(&source, at(0), 600 * 4096, now), 600 * 4096);
        assert_eq!(known.prefix(&source, at(250), 12 * 4096, now), 12 * 4096);
        assert_eq!(known.prefix(&source, at(599), 4096, now), 4096);
    }

    #[test]
    fn an_answer_is_believed_for_a_while_and_then_asked_for_again() {
        let (_file, source) = source(4);
        let start = Instant::now();
        let at = Location { file: 0, offset: 0 };
        let mut known = Residency::default();
        // What it would believe if it never asked.
        known.prefix(&source, at, 4096, start);
        for entry in &mut known.entries {
            entry.resident = ChunkBits::default();
        }
        let soon = start + TRUSTED - Duration::from_nanos(1);
        assert_eq!(known.prefix(&source, at, 4096, soon), 0);
        assert_eq!(known.prefix(&source, at, 4096, start + TRUSTED), 4096);
    }
}
