//! The sessions of one worker, by place: a place is what a ring's completion names.
//!
//! Places are reused, so each entry has a stamp; a completion that was under way when its
//! entry left names the old stamp and finds nothing.

use crate::expecting::Expecting;
use crate::session::Session;

/// One session, waited for or served.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) stamp: u32,
    pub(crate) phase: Phase,
    /// Whether it is in the worker's queue.
    pub(crate) ready: bool,
    /// Whether the ring will report its next event.
    pub(crate) armed: bool,
    /// Whether the daemon was told that its VMM asks for nothing any more.
    pub(crate) over: bool,
}

/// Where a session is in its life.
pub(crate) enum Phase {
    /// Its VMM has not handed its memory over.
    Expecting {
        request: u64,
        expecting: Box<Expecting>,
    },
    /// Its faults are answered.
    Serving(Box<Session>),
}

/// All entries of one worker.
#[derive(Default)]
pub(crate) struct Roster {
    entries: Vec<Option<Entry>>,
    last_stamp: u32,
}

impl Roster {
    /// Puts an entry into the first free place.
    pub(crate) fn insert(&mut self, name: String, phase: Phase) -> (u32, &mut Entry) {
        self.last_stamp = self.last_stamp.wrapping_add(1);
        let entry = Entry {
            name,
            stamp: self.last_stamp,
            phase,
            ready: false,
            armed: false,
            over: false,
        };
        let free = self.entries.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        (index as u32, self.entries[index].insert(entry))
    }

    /// The entry in a place, if it is the one that a completion means.
    pub(crate) fn get(&mut self, index: u32, stamp: u32) -> Option<&mut Entry> {
        self.at(index).filter(|entry| entry.stamp == stamp)
    }

    /// Whatever is in a place.
    pub(crate) fn at(&mut self, index: u32) -> Option<&mut Entry> {
        self.entries.get_mut(index as usize)?.as_mut()
    }

    /// Takes an entry out of its place.
    pub(crate) fn take(&mut self, index: u32) -> Option<Entry> {
        self.entries.get_mut(index as usize)?.take()
    }

    /// The place of a session.
    pub(crate) fn find(&self, name: &str) -> Option<u32> {
        let is_it = |entry: &Option<Entry>| entry.as_ref().is_some_and(|e| e.name == name);
        self.entries
            .iter()
            .position(is_it)
            .map(|index| index as u32)
    }

    /// How many places there are, taken or free.
    pub(crate) fn places(&self) -> u32 {
        self.entries.len() as u32
    }
}
