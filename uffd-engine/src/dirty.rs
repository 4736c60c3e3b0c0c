//! Which pages of a stopped guest differ from its parent build, for memory that is a
//! shared file (QEMU's RAM in a memfd).
//!
//! The ground truth is the content: a page that the file holds is compared with the
//! parent by the writer. The page-state table says what no content can: whether a page
//! the file does *not* hold was never there (the parent's content stands) or was given
//! back (it reads as zero now).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::unistd::{Whence, lseek64};
use snapshot_format::{FormatError, MemoryWriter, PageCount, PageIndex};
use thiserror::Error;

use crate::page_state::{PageState, PageStates};

/// Pages are read in runs of this size: large enough that the system call doesn't
/// matter, small enough to stay in the cache until it is compared.
const READ_BYTES: usize = 256 << 10;

/// Why the changed pages could not be written.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// The guest's memory could not be read.
    #[error("Reading guest memory at page {page}")]
    Memory {
        /// Where.
        page: PageIndex,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The build could not be written.
    #[error("Writing changed pages")]
    Write(#[from] FormatError),
}

/// What a page of the guest needs at a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It is in memory: compare it with the parent.
    Compare,
    /// It was never touched: the parent's content stands.
    Inherit,
    /// It was given back: zero, whatever the parent says.
    Zero,
}

fn verdict(in_memory: bool, state: PageState) -> Verdict {
    match (in_memory, state) {
        (true, _) => Verdict::Compare,
        (false, PageState::Missing | PageState::Reading) => Verdict::Inherit,
        (false, PageState::Clean | PageState::Zero | PageState::Dirty | PageState::Removed) => {
            Verdict::Zero
        }
    }
}

/// Feeds every page that may differ from the parent to `writer`, in order. `states` is
/// the table of the session that served this guest; `None` for one that was booted
/// and has no parent.
///
/// # Errors
/// Memory can't be read, or the build can't be written; nothing was published.
pub fn capture(
    ram: &File,
    pages: PageCount,
    page_bytes: u64,
    states: Option<&PageStates>,
    writer: &mut MemoryWriter,
) -> Result<(), CaptureError> {
    let mut buffer = vec![0u8; READ_BYTES];
    let run_pages = READ_BYTES as u64 / page_bytes;
    let mut next = 0;
    while next < pages.get() {
        let data = next_data(ram, next, pages.get(), page_bytes).map_err(|source| {
            CaptureError::Memory {
                page: PageIndex::new(next),
                source,
            }
        })?;
        if let Some(states) = states {
            for run in zeroed_runs(next..data.start, states) {
                let count = PageCount::new(run.end - run.start);
                writer.zero(PageIndex::new(run.start), count)?;
            }
        }
        let mut at = data.start;
        while at < data.end {
            let count = run_pages.min(data.end - at);
            let bytes = &mut buffer[..(count * page_bytes) as usize];
            let page = PageIndex::new(at);
            ram.read_exact_at(bytes, at * page_bytes)
                .map_err(|source| CaptureError::Memory { page, source })?;
            writer.pages(page, bytes)?;
            at += count;
        }
        next = data.end;
    }
    Ok(())
}

/// The next run of pages that the file holds, from `from` on; empty at `end` when
/// there is none.
fn next_data(ram: &File, from: u64, end: u64, page_bytes: u64) -> io::Result<Range<u64>> {
    let data = match lseek64(ram, (from * page_bytes) as i64, Whence::SeekData) {
        Ok(at) => at as u64 / page_bytes,
        Err(nix::Error::ENXIO) => return Ok(end..end),
        Err(error) => return Err(error.into()),
    };
    let hole = lseek64(ram, (data * page_bytes) as i64, Whence::SeekHole)? as u64;
    Ok(data.min(end)..hole.div_ceil(page_bytes).min(end))
}

/// The runs of a hole whose pages were there once.
fn zeroed_runs(hole: Range<u64>, states: &PageStates) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in hole {
        if verdict(false, states.get(PageIndex::new(page))) != Verdict::Zero {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_page_given_back_is_zero_and_an_untouched_one_is_the_parents() {
        assert_eq!(verdict(false, PageState::Removed), Verdict::Zero);
        assert_eq!(verdict(false, PageState::Clean), Verdict::Zero);
        assert_eq!(verdict(false, PageState::Missing), Verdict::Inherit);
        assert_eq!(verdict(false, PageState::Reading), Verdict::Inherit);
        // Present without the table knowing: its engine died before it could say so.
        assert_eq!(verdict(true, PageState::Missing), Verdict::Compare);
    }

    #[test]
    fn holes_are_skipped_and_data_is_found() {
        let memfd = nix::sys::memfd::memfd_create(c"ram", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        let ram = File::from(memfd.unwrap());
        ram.set_len(64 * 4096).unwrap();
        ram.write_all_at(&[1; 8192], 10 * 4096).unwrap();
        ram.write_all_at(&[1; 1], 63 * 4096).unwrap();
        assert_eq!(next_data(&ram, 0, 64, 4096).unwrap(), 10..12);
        assert_eq!(next_data(&ram, 12, 64, 4096).unwrap(), 63..64);
        ram.set_len(20 * 4096).unwrap();
        assert_eq!(next_data(&ram, 12, 20, 4096).unwrap(), 20..20);
    }

    #[test]
    fn only_pages_that_were_there_once_are_zeroed() {
        let states = PageStates::create(PageCount::new(10)).unwrap();
        for page in [2, 3, 5] {
            states.set(PageIndex::new(page), PageState::Clean);
        }
        states.set(PageIndex::new(6), PageState::Removed);
        states.set(PageIndex::new(8), PageState::Reading);
        assert_eq!(zeroed_runs(0..10, &states), [2..4, 5..7]);
    }
}
