//! Two builds compared, page by page.
//!
//! Where both maps name the same page of the same data, nothing is read; elsewhere contents are
//! compared, so that builds without a common ancestor can be, too.

use std::ops::Range;

use serde::Serialize;

use crate::build::Build;
use crate::build_id::BuildId;
use crate::error::FormatError;
use crate::extent::{Extent, Origin};
use crate::manifest::file_name;
use crate::map_header::BuildEntry;
use crate::sparse::READ_BYTES;
use crate::units::{PageCount, PageIndex, PageSize};
use crate::working_set::PageRun;

/// The most runs that a comparison lists; further ones are counted.
pub const MAX_RUNS: usize = 100_000;

/// What is different in one build compared to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The build that is compared to.
    pub from: BuildId,
    /// The build that is looked at.
    pub to: BuildId,
    /// The page size in bytes, of both.
    pub page_size: PageSize,
    /// The size of the memory, of both.
    pub memory_pages: PageCount,
    /// Pages that both take from the same place.
    pub shared_pages: PageCount,
    /// Pages with equal content from different places.
    pub equal_pages: PageCount,
    /// Pages with different content.
    pub changed_pages: PageCount,
    /// How many of those are zero in `to`.
    pub became_zero_pages: PageCount,
    /// How many of those were zero in `from`.
    pub became_content_pages: PageCount,
    /// Where pages changed, in ascending order, up to [`MAX_RUNS`].
    pub changed_runs: Vec<PageRun>,
    /// Runs beyond those.
    pub changed_runs_omitted: u64,
    /// Files other than the memory's that only one has, or that are not the same.
    pub changed_files: Vec<String>,
}

/// How far a comparison is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DifferenceProgress {
    /// Pages that are compared.
    pub done: PageCount,
    /// Pages of the memory.
    pub total: PageCount,
}

impl Difference {
    /// Compares two builds of any stores; cold ones may be among them.
    ///
    /// # Errors
    /// [`FormatError::ParentGeometry`] if their memories are of different size or page size;
    /// [`FormatError::Io`], or [`FormatError::Corrupt`] from encoded data.
    pub fn between(
        from: &Build,
        to: &Build,
        progress: &mut dyn FnMut(DifferenceProgress),
    ) -> Result<Self, FormatError> {
        let (old, new) = (from.map(), to.map());
        if old.page_size() != new.page_size() || old.memory_pages() != new.memory_pages() {
            return Err(FormatError::ParentGeometry {
                parent: from.id(),
                pages: new.memory_pages(),
                page_size: new.page_size(),
                parent_pages: old.memory_pages(),
                parent_page_size: old.page_size(),
            });
        }
        let mut comparison = Comparison {
            from,
            to,
            old: Vec::new(),
            new: Vec::new(),
            run_end: None,
            found: Self {
                from: from.id(),
                to: to.id(),
                page_size: new.page_size(),
                memory_pages: new.memory_pages(),
                shared_pages: PageCount::default(),
                equal_pages: PageCount::default(),
                changed_pages: PageCount::default(),
                became_zero_pages: PageCount::default(),
                became_content_pages: PageCount::default(),
                changed_runs: Vec::new(),
                changed_runs_omitted: 0,
                changed_files: changed_files(from, to),
            },
        };
        comparison.pages(progress)?;
        Ok(comparison.found)
    }

    /// Whether memory and all other files are the same.
    pub fn is_none(&self) -> bool {
        self.changed_pages.is_zero() && self.changed_files.is_empty()
    }
}

struct Comparison<'a> {
    from: &'a Build,
    to: &'a Build,
    old: Vec<u8>,
    new: Vec<u8>,
    /// Where the run that changed last ends, listed or not.
    run_end: Option<PageIndex>,
    found: Difference,
}

impl Comparison<'_> {
    fn pages(&mut self, progress: &mut dyn FnMut(DifferenceProgress)) -> Result<(), FormatError> {
        let total = self.found.memory_pages;
        let window = PageCount::new((READ_BYTES as u64 / self.found.page_size.bytes()).max(1));
        let end = PageIndex::new(0) + total;
        let mut next = PageIndex::new(0);
        while next < end {
            next = self.skip_shared(next, end);
            let behind = (next + window).min(end);
            if next < behind {
                self.window(next..behind)?;
            }
            next = behind;
            let done = next - PageIndex::new(0);
            progress(DifferenceProgress { done, total });
        }
        Ok(())
    }

    /// Counts the shared pages from here on, up to the first that isn't.
    fn skip_shared(&mut self, from: PageIndex, end: PageIndex) -> PageIndex {
        let mut next = from;
        for (old, new) in pieces(self.from, self.to, from..end) {
            if !same_place(self.from, &old, self.to, &new) {
                break;
            }
            next = new.end();
        }
        self.found.shared_pages = self.found.shared_pages + (next - from);
        next
    }

    /// Compares the pages of a window that are not shared.
    fn window(&mut self, range: Range<PageIndex>) -> Result<(), FormatError> {
        let page_bytes = in_memory(self.found.page_size.bytes());
        let bytes = in_memory((range.end - range.start).get()) * page_bytes;
        self.old.resize(bytes, 0);
        self.new.resize(bytes, 0);
        self.from.read_range(range.start, &mut self.old)?;
        self.to.read_range(range.start, &mut self.new)?;
        for (old, new) in pieces(self.from, self.to, range.clone()) {
            if same_place(self.from, &old, self.to, &new) {
                self.found.shared_pages = self.found.shared_pages + new.pages;
                continue;
            }
            for offset in 0..new.pages.get() {
                let page = new.start + PageCount::new(offset);
                let at = in_memory((page - range.start).get()) * page_bytes;
                self.page(page, at..at + page_bytes);
            }
        }
        Ok(())
    }

    fn page(&mut self, page: PageIndex, at: Range<usize>) {
        let one = PageCount::new(1);
        let (old, new) = (&self.old[at.clone()], &self.new[at]);
        if old == new {
            self.found.equal_pages = self.found.equal_pages + one;
            return;
        }
        let zero = |content: &[u8]| content.iter().all(|byte| *byte == 0);
        if zero(new) {
            self.found.became_zero_pages = self.found.became_zero_pages + one;
        } else if zero(old) {
            self.found.became_content_pages = self.found.became_content_pages + one;
        }
        self.found.changed_pages = self.found.changed_pages + one;
        self.list(page);
    }

    /// Enters a changed page into the list of runs.
    fn list(&mut self, page: PageIndex) {
        let one = PageCount::new(1);
        let goes_on = self.run_end == Some(page);
        self.run_end = Some(page + one);
        let full = self.found.changed_runs.len() == MAX_RUNS;
        match self.found.changed_runs.last_mut() {
            Some(run) if goes_on && self.found.changed_runs_omitted == 0 => {
                run.pages = run.pages + one;
            }
            _ if goes_on => {}
            _ if full => self.found.changed_runs_omitted += 1,
            _ => self.found.changed_runs.push(PageRun {
                start: page,
                pages: one,
            }),
        }
    }
}

/// The extents of both maps over the same pages, cut where either of them ends.
fn pieces(
    from: &Build,
    to: &Build,
    range: Range<PageIndex>,
) -> impl Iterator<Item = (Extent, Extent)> {
    let (mut old, mut new) = (from.map().cursor(), to.map().cursor());
    let mut next = range.start;
    std::iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        let (a, b) = (old.lookup(next)?, new.lookup(next)?);
        let both = next..a.end().min(b.end()).min(range.end);
        next = both.end;
        Some((a.clip(&both)?, b.clip(&both)?))
    })
}

/// Whether two pieces over the same pages are the same pages of the same data.
fn same_place(from: &Build, old: &Extent, to: &Build, new: &Extent) -> bool {
    let entry =
        |build: &Build, origin: u16| -> BuildEntry { build.map().builds()[usize::from(origin)] };
    match (old.origin, new.origin) {
        (Origin::Zero, Origin::Zero) => true,
        (Origin::Build(a), Origin::Build(b)) => {
            let (a, b) = (entry(from, a), entry(to, b));
            // The sums name the data: an id alone may be of another store.
            a.id == b.id && a.sums_crc == b.sums_crc && old.storage == new.storage
        }
        _ => false,
    }
}

fn changed_files(from: &Build, to: &Build) -> Vec<String> {
    let (old, new) = (&from.manifest().files, &to.manifest().files);
    let memory = [file_name::MAP, file_name::DATA, file_name::SUMS];
    let mut names: Vec<&String> = old.keys().chain(new.keys()).collect();
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .filter(|name| !memory.contains(&name.as_str()) && old.get(*name) != new.get(*name))
        .cloned()
        .collect()
}

fn in_memory(count: u64) -> usize {
    usize::try_from(count).expect("a window fits memory")
}
