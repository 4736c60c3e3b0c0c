//! The data files that a worker's ring keeps, so that reading them costs no look-up.
//!
//! A file is registered at its first read and let go of with the last session of its source: what
//! a ring keeps stays open. Where there is no room the descriptor does as well.

use std::collections::HashMap;

use crate::source::{Location, PageSource};
use crate::sys::ring::{FileSlot, ReadFile, Ring};

/// All registered data files of one worker.
#[derive(Default)]
pub(crate) struct DataFiles {
    /// By the source's serial.
    sources: HashMap<u32, Registered>,
}

struct Registered {
    sessions: usize,
    /// By the file's number in the source.
    slots: Vec<Option<FileSlot>>,
}

impl DataFiles {
    /// One more session is served from this source.
    pub(crate) fn enter(&mut self, source: &PageSource) {
        let registered = self
            .sources
            .entry(source.serial())
            .or_insert_with(|| Registered {
                sessions: 0,
                slots: vec![None; source.file_count()],
            });
        registered.sessions += 1;
    }

    /// One less is.
    pub(crate) fn leave(&mut self, source: &PageSource, ring: &mut Ring) {
        let Some(registered) = self.sources.get_mut(&source.serial()) else {
            return;
        };
        registered.sessions -= 1;
        if registered.sessions == 0
            && let Some(registered) = self.sources.remove(&source.serial())
        {
            let slots = registered.slots.into_iter().flatten();
            slots.for_each(|slot| ring.forget_file(slot));
        }
    }

    /// The file of a location, for one read.
    pub(crate) fn file<'fd>(
        &mut self,
        source: &'fd PageSource,
        at: Location,
        ring: &mut Ring,
    ) -> ReadFile<'fd> {
        let fd = source.direct(at);
        let Some(registered) = self.sources.get_mut(&source.serial()) else {
            return ReadFile::Plain(fd);
        };
        let slot = &mut registered.slots[usize::from(at.file)];
        *slot = slot.or_else(|| ring.register_file(fd));
        slot.map_or(ReadFile::Plain(fd), ReadFile::Registered)
    }
}
