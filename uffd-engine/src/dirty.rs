//! Which pages of a stopped guest differ from its parent build.
//!
//! The ground truth is the content: a page that the memory has is compared with the
//! parent by the writer, unless it is known that nobody wrote it. The page-state table
//! says what no content can: whether a page the memory does *not* have was never there (the
//! parent's content stands) or was given back (it reads as zero now).
//!
//! The vCPUs are stopped, and still pages may appear while this looks: an engine may be
//! installing what it had read ahead. So the table is copied before the memory is looked at. What
//! the copy calls installed *was* there; if it isn't any more, it was given back.

use std::io;
use std::ops::Range;

use snapshot_format::{Build, FormatError, MemoryWriter, PageCount, PageIndex};
use thiserror::Error;

use crate::dirty_set::{DirtySource, Divergence, UnwrittenPages};
use crate::memory_image::MemoryImage;
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
    /// The build could not be written, or its parent not read.
    #[error("Writing changed pages")]
    Write(#[from] FormatError),
    /// A page was called unwritten that is not what the parent has.
    #[error("Checking what is known of the guest's writes")]
    Divergence(#[from] Divergence),
}

/// What a page of the guest needs at a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It is in memory: compare it with the parent.
    Compare,
    /// It was never touched, or never written: the parent's content stands.
    Inherit,
    /// It was given back: zero, whatever the parent says.
    Zero,
}

fn verdict(in_memory: bool, state: PageState, unwritten: bool) -> Verdict {
    match (in_memory, state) {
        (true, PageState::Clean | PageState::Zero) if unwritten => Verdict::Inherit,
        (true, _) => Verdict::Compare,
        (false, PageState::Missing | PageState::Reading) => Verdict::Inherit,
        (false, PageState::Clean | PageState::Zero | PageState::Dirty | PageState::Removed) => {
            Verdict::Zero
        }
    }
}

/// A stopped guest's memory, and what is known of it.
#[derive(Clone, Copy, Debug)]
pub struct Capture<'a> {
    /// What can be read of it.
    pub memory: &'a MemoryImage,
    /// How many pages it has.
    pub pages: PageCount,
    /// Of how many bytes each.
    pub page_bytes: u64,
    /// The table of the session that served this guest; `None` for one that was booted and
    /// has no parent.
    pub states: Option<&'a PageStates>,
    /// What is known to be unwritten; these pages are not read.
    pub unwritten: Option<&'a UnwrittenPages>,
    /// Their parent, for them to be read and compared after all.
    pub check: Option<&'a Build>,
}

/// What a capture looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Captured {
    /// How changed pages were told from others.
    pub source: DirtySource,
    /// Pages whose content was compared with the parent's.
    pub compared: PageCount,
    /// Pages that were known to be unwritten.
    pub unwritten: PageCount,
}

impl Capture<'_> {
    /// Feeds every page that may differ from the parent to `writer`, in order.
    ///
    /// # Errors
    /// Memory can't be read, the build can't be written, or what was known is wrong: publish
    /// nothing then.
    pub fn write(&self, writer: &mut MemoryWriter) -> Result<Captured, CaptureError> {
        let states = self.states.map(PageStates::to_vec);
        let states = states.as_deref();
        let mut captured = Captured {
            source: match self.unwritten {
                Some(unwritten) => unwritten.source(),
                None => DirtySource::Comparison,
            },
            compared: PageCount::new(0),
            unwritten: PageCount::new(0),
        };
        let mut buffer = vec![0u8; (self.run_pages() * self.page_bytes) as usize];
        let mut next = 0;
        while next < self.pages.get() {
            let data = self
                .memory
                .next_data(next, self.pages.get(), self.page_bytes);
            let data = data.map_err(|source| CaptureError::Memory {
                page: PageIndex::new(next),
                source,
            })?;
            if let Some(states) = states {
                for run in zeroed_runs(next..data.start, states) {
                    let count = PageCount::new(run.end - run.start);
                    writer.zero(PageIndex::new(run.start), count)?;
                }
            }
            let mut at = data.start;
            while at < data.end {
                let (verdict, end) = self.run_of_one_verdict(at..data.end, states);
                let count = PageCount::new(end - at);
                if verdict == Verdict::Inherit {
                    captured.unwritten = captured.unwritten + count;
                    self.check_unwritten(at..end, &mut buffer)?;
                } else {
                    captured.compared = captured.compared + count;
                    let bytes = self.read(at..end, &mut buffer)?;
                    writer.pages(PageIndex::new(at), bytes)?;
                }
                at = end;
            }
            next = data.end;
        }
        Ok(captured)
    }

    /// How many pages are read at once: a huge page is a run by itself.
    const fn run_pages(&self) -> u64 {
        let pages = READ_BYTES as u64 / self.page_bytes;
        if pages == 0 { 1 } else { pages }
    }

    /// The longest run from the first of these pages in memory that one verdict is true for, as
    /// far as one read goes.
    fn run_of_one_verdict(
        &self,
        pages: Range<u64>,
        states: Option<&[PageState]>,
    ) -> (Verdict, u64) {
        let longest = pages.end.min(pages.start + self.run_pages());
        let (Some(states), Some(unwritten)) = (states, self.unwritten) else {
            return (Verdict::Compare, longest);
        };
        let of = |page: u64| {
            let unwritten = unwritten.has(PageIndex::new(page));
            verdict(true, states[page as usize], unwritten)
        };
        let first = of(pages.start);
        let end = (pages.start..longest).find(|page| of(*page) != first);
        (first, end.unwrap_or(longest))
    }

    fn read<'b>(&self, pages: Range<u64>, buffer: &'b mut [u8]) -> Result<&'b [u8], CaptureError> {
        let bytes = &mut buffer[..((pages.end - pages.start) * self.page_bytes) as usize];
        let page = PageIndex::new(pages.start);
        self.memory
            .read(page, self.page_bytes, bytes)
            .map_err(|source| CaptureError::Memory { page, source })?;
        Ok(bytes)
    }

    /// The self-check: compares what nobody is said to have written.
    fn check_unwritten(&self, pages: Range<u64>, buffer: &mut [u8]) -> Result<(), CaptureError> {
        let Some(parent) = self.check else {
            return Ok(());
        };
        let ours = self.read(pages.clone(), buffer)?;
        let mut theirs = vec![0; self.page_bytes as usize];
        for (page, ours) in pages.zip(ours.chunks(self.page_bytes as usize)) {
            let page = PageIndex::new(page);
            parent.read_page(page, &mut theirs)?;
            if ours != theirs {
                let source_used = self
                    .unwritten
                    .map_or(DirtySource::Comparison, UnwrittenPages::source);
                return Err(Divergence {
                    source_used,
                    page,
                    missed: 1,
                }
                .into());
            }
        }
        Ok(())
    }
}

/// The runs of a hole whose pages were there once.
fn zeroed_runs(hole: Range<u64>, states: &[PageState]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in hole {
        if verdict(false, states[page as usize], false) != Verdict::Zero {
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

    #[test]
    fn a_page_given_back_is_zero_and_an_untouched_one_is_the_parents() {
        assert_eq!(verdict(false, PageState::Removed, false), Verdict::Zero);
        assert_eq!(verdict(false, PageState::Clean, false), Verdict::Zero);
        assert_eq!(verdict(false, PageState::Missing, false), Verdict::Inherit);
        assert_eq!(verdict(false, PageState::Reading, false), Verdict::Inherit);
        // Present without the table knowing: its engine died before it could say so.
        assert_eq!(verdict(true, PageState::Missing, false), Verdict::Compare);
    }

    #[test]
    fn only_an_installed_page_that_nobody_wrote_is_not_compared() {
        assert_eq!(verdict(true, PageState::Clean, true), Verdict::Inherit);
        assert_eq!(verdict(true, PageState::Zero, true), Verdict::Inherit);
        assert_eq!(verdict(true, PageState::Clean, false), Verdict::Compare);
        // It is zero in place of what the parent has.
        assert_eq!(verdict(true, PageState::Dirty, true), Verdict::Compare);
        assert_eq!(verdict(true, PageState::Removed, true), Verdict::Compare);
        assert_eq!(verdict(true, PageState::Missing, true), Verdict::Compare);
    }

    #[test]
    fn only_pages_that_were_there_once_are_zeroed() {
        let states = PageStates::create(PageCount::new(10)).unwrap();
        for page in [2, 3, 5] {
            states.set(PageIndex::new(page), PageState::Clean);
        }
        states.set(PageIndex::new(6), PageState::Removed);
        states.set(PageIndex::new(8), PageState::Reading);
        assert_eq!(zeroed_runs(0..10, &states.to_vec()), [2..4, 5..7]);
    }
}
