//! Reads in flight: which buffer belongs to which session's request.
//!
//! Invariant: a slot is lent to the kernel from [`ReadJobs::start`] to
//! [`ReadJobs::finish`], and stays taken until [`ReadJobs::release`], so that its
//! content can be installed before another read overwrites it.
//!
//! No session has more than a quarter of the slots: a disk or a file server that doesn't answer
//! stops the guests that wait for it, and nobody else.

use std::time::Instant;

use crate::data_files::DataFiles;
use crate::residency::Residency;
use crate::session::{ReadRequest, Reads};
use crate::source::{Location, PageSource};
use crate::sys::ring::{Ring, SlotRead, Token};
use crate::worker::Worker;

/// One read and whom it is for.
#[derive(Clone, Copy)]
pub(crate) struct Job {
    pub(crate) request: ReadRequest,
    /// The session's place among its worker's entries.
    pub(crate) index: u32,
    /// Tells that session from a later one in the same place.
    pub(crate) stamp: u32,
}

/// All read slots of one worker.
pub(crate) struct ReadJobs {
    slots: Vec<Option<(u32, Job)>>,
    /// Slots for runs of pages, and for one huge page each.
    free: [Vec<usize>; 2],
    /// The first slot for a huge page.
    first_huge: usize,
    /// Slots that are lent, by the session's place and the kind of slot.
    lent: Vec<[usize; 2]>,
    /// The most of each kind that one session may have.
    share: [usize; 2],
    next_stamp: u32,
}

impl ReadJobs {
    pub(crate) fn new(slots: usize, huge_slots: usize) -> Self {
        Self {
            slots: vec![None; slots + huge_slots],
            free: [(0..slots).collect(), (slots..slots + huge_slots).collect()],
            first_huge: slots,
            lent: Vec::new(),
            share: [slots, huge_slots].map(|all| (all / 4).max(1)),
            next_stamp: 0,
        }
    }

    fn start(&mut self, job: Job, slot_bytes: u64) -> Option<Token> {
        let kind = usize::from(job.request.bytes > slot_bytes);
        let place = job.index as usize;
        if place >= self.lent.len() {
            self.lent.resize(place + 1, [0; 2]);
        }
        if self.lent[place][kind] >= self.share[kind] {
            return None;
        }
        let slot = self.free[kind].pop()?;
        self.lent[place][kind] += 1;
        self.next_stamp = self.next_stamp.wrapping_add(1);
        self.slots[slot] = Some((self.next_stamp, job));
        Some(Worker::read_token(slot, self.next_stamp))
    }

    /// Whether some read for this place is under way.
    pub(crate) fn are_lent(&self, place: u32) -> bool {
        self.lent
            .get(place as usize)
            .is_some_and(|lent| lent.iter().any(|slots| *slots > 0))
    }

    /// The job of a finished read; its slot stays taken.
    pub(crate) fn finish(&mut self, token: Token) -> Option<Job> {
        let (stamp, job) = self.slots[token.index as usize].take()?;
        assert_eq!(
            stamp, token.stamp,
            "a read slot was reused while its read was in flight"
        );
        let kind = usize::from(token.index as usize >= self.first_huge);
        self.lent[job.index as usize][kind] -= 1;
        Some(job)
    }

    /// Makes a slot available again.
    pub(crate) fn release(&mut self, slot: usize) {
        self.free[usize::from(slot >= self.first_huge)].push(slot);
    }
}

/// What a worker has for all of its sessions' pages.
pub(crate) struct PageReads {
    pub(crate) ring: Ring,
    pub(crate) jobs: ReadJobs,
    pub(crate) residency: Residency,
    pub(crate) files: DataFiles,
}

impl PageReads {
    /// For the turn of one session.
    pub(crate) fn reader(&mut self, index: u32, stamp: u32) -> Reader<'_> {
        Reader {
            reads: self,
            index,
            stamp,
        }
    }
}

/// A session's way to what its worker has for all, for the length of one turn.
pub(crate) struct Reader<'a> {
    reads: &'a mut PageReads,
    index: u32,
    stamp: u32,
}

impl Reads for Reader<'_> {
    fn resident(&mut self, source: &PageSource, at: Location, len: u64, now: Instant) -> u64 {
        self.reads.residency.prefix(source, at, len, now)
    }

    fn longest_read(&self, page_bytes: u64) -> u64 {
        self.reads.ring.slot_bytes().max(page_bytes)
    }

    fn start(&mut self, source: &PageSource, request: ReadRequest) -> bool {
        let PageReads {
            ring, jobs, files, ..
        } = &mut *self.reads;
        let job = Job {
            request,
            index: self.index,
            stamp: self.stamp,
        };
        let Some(token) = jobs.start(job, ring.slot_bytes()) else {
            return false;
        };
        let slot = token.index as usize;
        let read = SlotRead {
            offset: request.at.offset,
            len: request.bytes as u32,
            slot,
            may_block: source.may_block(request.at),
        };
        let file = files.file(source, request.at, ring);
        let started = ring.read_into_slot(file, read, token).is_ok();
        if !started {
            jobs.finish(token);
            jobs.release(slot);
        }
        started
    }
}
