//! The builds that are open: those that sessions are served from, and for a while those that
//! were.
//!
//! Opening a build means reading its map, mapping its files, and building page tables as its pages
//! are copied. A template whose clones come and go would pay for that again and again, so the last
//! few stay open for some seconds. The disk space of one that is deleted meanwhile comes back as
//! much later.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use snapshot_format::BuildId;

use crate::source::PageSource;

/// How long a build stays open after its last session.
const LINGERING: Duration = Duration::from_secs(10);
/// How many do.
const MOST_LINGERING: usize = 16;

/// All open builds of an engine.
#[derive(Default)]
pub(super) struct Sources {
    open: HashMap<BuildId, (PathBuf, Weak<PageSource>)>,
    /// In the order in which they are let go.
    lingering: VecDeque<(Instant, Arc<PageSource>)>,
}

impl Sources {
    /// A build that is open.
    pub(super) fn get(&self, store: &Path, build: BuildId) -> Option<Arc<PageSource>> {
        let (from, source) = self.open.get(&build)?;
        (from == store).then(|| source.upgrade())?
    }

    /// Notes a build that has been opened.
    pub(super) fn insert(&mut self, store: PathBuf, build: BuildId, source: &Arc<PageSource>) {
        self.open.retain(|_, (_, source)| source.strong_count() > 0);
        self.open.insert(build, (store, Arc::downgrade(source)));
    }

    /// A session of this source has ended.
    pub(super) fn linger(&mut self, source: Arc<PageSource>, now: Instant) {
        self.lingering
            .retain(|(_, other)| !Arc::ptr_eq(other, &source));
        self.lingering.push_back((now + LINGERING, source));
        if self.lingering.len() > MOST_LINGERING {
            self.lingering.pop_front();
        }
    }

    /// When the next one is to be let go.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.lingering.front().map(|(due, _)| *due)
    }

    /// Lets go of those whose time is over.
    pub(super) fn let_go(&mut self, now: Instant) {
        while self.next_due().is_some_and(|due| due <= now) {
            self.lingering.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot_format::PageSize;

    fn source() -> Arc<PageSource> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        PageSource::open_plain(file.path(), PageSize::Size4K).unwrap()
    }

    #[test]
    fn a_build_stays_open_for_a_while_after_its_last_session() {
        let (store, build) = (PathBuf::from("/builds"), BuildId::from_bytes([1; 16]));
        let (mut sources, source) = (Sources::default(), source());
        sources.insert(store.clone(), build, &source);
        assert!(sources.get(&store, build).is_some());
        assert!(sources.get(Path::new("/others"), build).is_none());
        let start = Instant::now();
        sources.linger(source, start);
        let end = start + LINGERING;
        sources.let_go(end - Duration::from_nanos(1));
        // Another session comes and goes.
        sources.linger(sources.get(&store, build).unwrap(), end);
        sources.let_go(end);
        assert!(sources.get(&store, build).is_some());
        assert_eq!(sources.next_due(), Some(end + LINGERING));
        sources.let_go(end + LINGERING);
        assert!(sources.get(&store, build).is_none());
        assert_eq!(sources.next_due(), None);
    }

    #[test]
    fn only_the_last_few_do() {
        let mut sources = Sources::default();
        let all: Vec<_> = (0..=MOST_LINGERING).map(|_| source()).collect();
        let start = Instant::now();
        all.iter()
            .for_each(|source| sources.linger(source.clone(), start));
        let held = all.iter().map(Arc::strong_count);
        assert!(held.eq(std::iter::once(1).chain([2; MOST_LINGERING])));
    }
}
