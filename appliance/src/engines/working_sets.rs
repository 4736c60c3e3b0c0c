//! Who records what a restore touches first, who replays it, and what is kept of recordings.
//!
//! ```text
//!   template's build ──▶ clones 1 to 3 record, what they have in common is kept ──▶ others replay
//!   paused sandbox's ──▶ has its parent's set; without one, its resume records ──▶ the next replays
//! ```
//!
//! All of it is advice: what goes wrong costs speed, and is logged.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use snapshot_format::{
    Build, BuildId, BuildStore, FormatError, PageCount, PageIndex, WorkingSet, WorkingSetFile,
};
use uffd_engine::recording::{self, MAX_RECORDED_PAGES};

/// Recordings of one template's build; those of several restores have less in common that is
/// chance.
const RECORDINGS: u32 = 3;
/// Builds whose recordings are counted; beyond, counting begins anew.
const MAX_COUNTED: usize = 4096;
/// How long a resume may wait for its set to be written: less than recording anew costs.
const PATIENCE: Duration = Duration::from_millis(50);

/// What a session does about its build's working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Record: there is none, or not a sure one.
    Record,
    /// Install it ahead of the faults.
    Replay,
    /// Nothing.
    Neither,
}

#[derive(Debug, Default)]
struct State {
    /// Recordings that were ordered, of builds that had no set at the first.
    ordered: HashMap<BuildId, u32>,
    /// Sets that are being written.
    writing: HashMap<BuildId, u32>,
}

/// The working sets of a host.
#[derive(Debug, Default)]
pub struct WorkingSets {
    state: Mutex<State>,
    written: Condvar,
    /// One recording of a build may be written at a time.
    writer: Mutex<()>,
}

impl WorkingSets {
    /// What a session that is restored from this build is to do. May wait a little for its set
    /// to be written.
    pub fn order(&self, build: &Build, is_template: bool) -> Order {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.state.lock();
        while state.writing.contains_key(&build.id()) {
            if self.written.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        // Nobody else's order waits for this file.
        drop(state);
        let present = match build.working_set() {
            WorkingSetFile::Present(_) => true,
            WorkingSetFile::Missing => false,
            WorkingSetFile::Ignored(reason) => {
                tracing::warn!(build_id = %build.id(), %reason, "Ignoring a working set");
                false
            }
        };
        let mut state = self.state.lock();
        if state.ordered.len() >= MAX_COUNTED {
            state.ordered.clear();
        }
        let most = if is_template { RECORDINGS } else { 1 };
        decide(&mut state.ordered, build.id(), present, most)
    }

    /// Keeps a recording, off this thread.
    pub fn keep(self: &Arc<Self>, store: BuildStore, build: BuildId, touches: Vec<PageIndex>) {
        let what = move || {
            let pages = recording::keep(&store, build, &touches)?;
            tracing::info!(build_id = %build, pages = pages.get(), "Kept a working set");
            Ok(())
        };
        self.write(build, None, what);
    }

    /// Gives a paused sandbox's build the set of its parent, off this thread: it is the same
    /// guest, which goes on where it stopped.
    pub fn inherit(self: &Arc<Self>, store: BuildStore, parent: BuildId, child: BuildId) {
        let what = move || {
            let WorkingSetFile::Present(known) = store.open(&parent)?.working_set() else {
                return Ok(());
            };
            let child = store.open(&child)?;
            let pages = known.runs().iter().flat_map(recording::pages_of);
            let most = PageCount::new(MAX_RECORDED_PAGES as u64);
            let set = WorkingSet::record(child.map(), pages, most);
            store.write_working_set(&child, &set)
        };
        self.write(child, Some(parent), what);
    }

    /// Writes the set of a build, after that of another if that is being written.
    fn write(
        self: &Arc<Self>,
        build: BuildId,
        after: Option<BuildId>,
        what: impl FnOnce() -> Result<(), FormatError> + Send + 'static,
    ) {
        *self.state.lock().writing.entry(build).or_insert(0) += 1;
        let sets = self.clone();
        let writes = move || {
            if let Some(other) = after {
                let mut state = sets.state.lock();
                while state.writing.contains_key(&other) {
                    sets.written.wait(&mut state);
                }
            }
            {
                let _one = sets.writer.lock();
                match what() {
                    Ok(()) => {}
                    Err(FormatError::NotFound { .. }) => {
                        tracing::debug!(build_id = %build, "Gone before its working set");
                    }
                    Err(error) => {
                        tracing::warn!(build_id = %build, %error, "A working set is lost");
                    }
                }
            }
            sets.end_writing(build);
        };
        let thread = std::thread::Builder::new().name("working-set".into());
        if let Err(error) = thread.spawn(writes) {
            tracing::warn!(build_id = %build, %error, "A working set is lost");
            self.end_writing(build);
        }
    }

    fn end_writing(&self, build: BuildId) {
        let mut state = self.state.lock();
        if let Some(count) = state.writing.get_mut(&build) {
            *count -= 1;
            if *count == 0 {
                state.writing.remove(&build);
            }
        }
        drop(state);
        self.written.notify_all();
    }
}

/// A set that was there before this daemon counted is sure enough.
fn decide(ordered: &mut HashMap<BuildId, u32>, build: BuildId, present: bool, most: u32) -> Order {
    let counted = ordered.get(&build).copied();
    if counted.is_none() && present || counted.is_some_and(|count| count >= most) {
        return if present {
            Order::Replay
        } else {
            Order::Neither
        };
    }
    ordered.insert(build, counted.unwrap_or(0) + 1);
    Order::Record
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot_format::{PageSize, PublishInfo};

    fn id(number: u8) -> BuildId {
        BuildId::from_bytes([number; 16])
    }

    #[test]
    fn three_clones_record_and_the_others_replay_what_came_of_it() {
        let mut ordered = HashMap::new();
        let orders: Vec<Order> = [false, false, true, true]
            .map(|present| decide(&mut ordered, id(1), present, RECORDINGS))
            .into();
        assert_eq!(orders[..3], [Order::Record; 3]);
        assert_eq!(orders[3], Order::Replay);
        // Nothing came of three recordings: no clone pays for a fourth.
        assert_eq!(
            decide(&mut ordered, id(1), false, RECORDINGS),
            Order::Neither
        );
    }

    #[test]
    fn a_set_that_was_there_is_replayed_and_a_paused_sandbox_records_once() {
        let mut ordered = HashMap::new();
        assert_eq!(decide(&mut ordered, id(1), true, RECORDINGS), Order::Replay);
        assert_eq!(decide(&mut ordered, id(2), false, 1), Order::Record);
        assert_eq!(decide(&mut ordered, id(2), false, 1), Order::Neither);
        assert_eq!(decide(&mut ordered, id(2), true, 1), Order::Replay);
    }

    fn publish(store: &BuildStore, build: BuildId, parent: Option<BuildId>) {
        let parent = parent.map(|id| store.open(&id).unwrap());
        let mut staging = store.stage(build).unwrap();
        let pages = PageCount::new(64);
        let mut writer = staging
            .memory_writer(parent.as_ref(), PageSize::Size4K, pages)
            .unwrap();
        writer
            .pages(PageIndex::new(0), &[build.as_bytes()[0]; 4096])
            .unwrap();
        writer.finish().unwrap();
        std::fs::write(staging.file_path("vmstate"), b"state").unwrap();
        staging.add_file("vmstate").unwrap();
        staging.publish(PublishInfo::default()).unwrap();
    }

    #[test]
    fn a_build_has_its_parents_set_even_if_that_is_just_being_written() {
        let dir = tempfile::tempdir().unwrap();
        let store = BuildStore::open_or_create(dir.path()).unwrap();
        publish(&store, id(1), None);
        publish(&store, id(2), Some(id(1)));
        let sets = Arc::new(WorkingSets::default());
        let touches = [7, 8, 9, 3].map(PageIndex::new).to_vec();
        sets.keep(store.clone(), id(1), touches);
        sets.inherit(store.clone(), id(1), id(2));
        let child = store.open(&id(2)).unwrap();
        let patience = Instant::now() + Duration::from_secs(20);
        // A resume that comes at once waits for it, up to its patience.
        while sets.order(&child, false) != Order::Replay {
            assert!(Instant::now() < patience, "no set came");
        }
        let WorkingSetFile::Present(set) = child.working_set() else {
            panic!("no set")
        };
        assert_eq!(set.pages(), PageCount::new(4));
        assert_eq!(set.runs()[0].start, PageIndex::new(7));
    }
}
