//! Recording what a restore touches first: the pages of demand faults, in their order, in a
//! bounded time after the first of them.
//!
//! While it goes on, a fault installs one page: a neighbour that is installed along would be
//! touched without anybody noticing. Nothing is allocated after the start.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use snapshot_format::{
    BuildId, BuildStore, FormatError, PageCount, PageIndex, PageRun, WorkingSet, WorkingSetFile,
};

/// The most pages of one recording; further touches are not kept.
pub const MAX_RECORDED_PAGES: usize = 32_768;

/// One recording.
#[derive(Debug)]
pub(crate) struct Recording {
    /// Page numbers; memory has at most 2^32 pages.
    touched: Vec<u32>,
    window: Duration,
    /// Set by the first fault.
    until: Option<Instant>,
}

impl Recording {
    pub(crate) fn new(window: Duration, max_pages: usize) -> Self {
        Self {
            touched: Vec::with_capacity(max_pages.min(MAX_RECORDED_PAGES)),
            window,
            until: None,
        }
    }

    /// Whether a fault at this time belongs to it.
    pub(crate) fn goes_on(&self, now: Instant) -> bool {
        self.touched.len() < self.touched.capacity() && self.until.is_none_or(|until| now < until)
    }

    /// Keeps a demand fault.
    pub(crate) fn note(&mut self, page: PageIndex, now: Instant) {
        if self.goes_on(now) {
            self.until.get_or_insert(now + self.window);
            self.touched.push(page.get() as u32);
        }
    }

    /// When its time is over; `None` before the first fault.
    pub(crate) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// What was touched, in order; a page may be in it twice.
    pub(crate) fn touches(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.touched
            .iter()
            .map(|page| PageIndex::new(u64::from(*page)))
    }
}

/// A recording as it travels to the daemon: little-endian 32-bit page numbers in a memfd.
pub(crate) fn to_memfd(touches: impl Iterator<Item = PageIndex>) -> io::Result<(OwnedFd, u64)> {
    let bytes: Vec<u8> = touches
        .flat_map(|page| (page.get() as u32).to_le_bytes())
        .collect();
    let memfd = memfd_create(c"thaw-recording", MFdFlags::MFD_CLOEXEC)?;
    let file = File::from(memfd);
    file.write_all_at(&bytes, 0)?;
    Ok((file.into(), bytes.len() as u64 / 4))
}

/// The pages of a recording that an engine sent.
///
/// # Errors
/// The descriptor can't be read, or holds more than a recording.
pub fn from_memfd(memfd: OwnedFd) -> io::Result<Vec<PageIndex>> {
    let file = File::from(memfd);
    let bytes = file.metadata()?.len() as usize;
    if bytes > MAX_RECORDED_PAGES * 4 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a recording of {bytes} bytes"),
        ));
    }
    let mut buffer = vec![0; bytes];
    file.read_exact_at(&mut buffer, 0)?;
    let words = buffer.as_chunks::<4>().0.iter();
    Ok(words
        .map(|word| PageIndex::new(u64::from(u32::from_le_bytes(*word))))
        .collect())
}

/// Writes a recording beside its build: as its working set if it had none, else what both have
/// in common. Returns how many pages are in the set now.
///
/// # Errors
/// The build can't be opened, or the file not written.
pub fn keep(
    store: &BuildStore,
    id: BuildId,
    touches: &[PageIndex],
) -> Result<PageCount, FormatError> {
    let build = store.open(&id)?;
    let most = PageCount::new(MAX_RECORDED_PAGES as u64);
    let record = |touches: Vec<PageIndex>| WorkingSet::record(build.map(), touches, most);
    let newer = record(touches.to_vec());
    let set = match build.working_set() {
        WorkingSetFile::Present(known) => record(intersect(known.runs(), newer.runs())),
        WorkingSetFile::Missing | WorkingSetFile::Ignored(_) => newer,
    };
    store.write_working_set(&build, &set)?;
    Ok(set.pages())
}

/// What two restores of one build have in common: the pages of `known` that `newer` touched as
/// well, in the order of `known`. Each further recording makes the set smaller and surer.
#[must_use]
pub fn intersect(known: &[PageRun], newer: &[PageRun]) -> Vec<PageIndex> {
    let mut ranges: Vec<_> = newer
        .iter()
        .map(|run| (run.start.get(), run.start.get() + run.pages.get()))
        .collect();
    ranges.sort_unstable();
    let touched = |page: u64| {
        let after = ranges.partition_point(|(start, _)| *start <= page);
        after > 0 && page < ranges[after - 1].1
    };
    known
        .iter()
        .flat_map(pages_of)
        .filter(|page| touched(page.get()))
        .collect()
}

/// The pages of a run, in order.
pub fn pages_of(run: &PageRun) -> impl Iterator<Item = PageIndex> + use<> {
    (run.start.get()..run.start.get() + run.pages.get()).map(PageIndex::new)
}

/// Consecutive pages put together.
#[cfg(test)]
fn runs_of(pages: impl IntoIterator<Item = PageIndex>) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.start.get() + run.pages.get() == page.get() => {
                run.pages = PageCount::new(run.pages.get() + 1);
            }
            _ => runs.push(PageRun {
                start: page,
                pages: PageCount::new(1),
            }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(runs: &[(u64, u64)]) -> Vec<PageRun> {
        let run = |(start, pages): &(u64, u64)| PageRun {
            start: PageIndex::new(*start),
            pages: PageCount::new(*pages),
        };
        runs.iter().map(run).collect()
    }

    #[test]
    fn what_comes_after_the_window_or_beyond_the_bound_is_not_kept() {
        let start = Instant::now();
        let window = Duration::from_millis(10);
        let mut recording = Recording::new(window, 3);
        // The window begins with the first fault, not with the recording.
        let first = start + Duration::from_secs(5);
        recording.note(PageIndex::new(7), first);
        recording.note(PageIndex::new(3), first + window - Duration::from_nanos(1));
        recording.note(PageIndex::new(4), first + window);
        let kept =
            |recording: &Recording| recording.touches().map(PageIndex::get).collect::<Vec<_>>();
        assert_eq!(kept(&recording), [7, 3]);
        assert!(!recording.goes_on(first + window));

        let mut small = Recording::new(window, 2);
        for page in 0..5 {
            small.note(PageIndex::new(page), start);
        }
        assert_eq!(kept(&small), [0, 1]);
    }

    #[test]
    fn an_intersection_keeps_the_order_of_what_was_known() {
        let known = runs(&[(100, 4), (0, 2), (50, 1)]);
        let newer = runs(&[(1, 1), (102, 10), (0, 1)]);
        let both: Vec<u64> = intersect(&known, &newer).iter().map(|p| p.get()).collect();
        assert_eq!(both, [102, 103, 0, 1]);
        assert_eq!(
            runs_of(intersect(&known, &newer)),
            runs(&[(102, 2), (0, 2)])
        );
        assert!(intersect(&known, &[]).is_empty());
    }
}
