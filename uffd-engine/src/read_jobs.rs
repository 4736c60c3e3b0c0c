//! Reads in flight: which buffer belongs to which session's request.
//!
//! Invariant: a slot is lent to the kernel from [`ReadJobs::start`] to
//! [`ReadJobs::finish`], and stays taken until [`ReadJobs::release`], so that its
//! content can be installed before another read overwrites it.
//!
//! No session has more than a quarter of the slots: a disk or a file server that doesn't answer
//! stops the guests that wait for it, and nobody else.

use std::time::Instant;

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

/// A session's way to what its worker has for all, for the length of one turn.
pub(crate) struct Reader<'a> {
    pub(crate) ring: &'a mut Ring,
    pub(crate) jobs: &'a mut ReadJobs,
    pub(crate) residency: &'a mut Residency,
    pub(crate) index: u32,
    pub(crate) stamp: u32,
}

impl Reads for Reader<'_> {
    fn resident(&mut self, source: &PageSource, at: Location, len: u64, now: Instant) -> u64 {
        self.residency.prefix(source, at, len, now)
    }

    fn longest_read(&self, page_bytes: u64) -> u64 {
        self.ring.slot_bytes().max(page_bytes)
    }

    fn start(&mut self, source: &PageSource, request: ReadRequest) -> bool {
        let job = Job {
            request,
            index: self.index,
            stamp: self.stamp,
        };
        let Some(token) = self.jobs.start(job, self.ring.slot_bytes()) else {
            return false;
        };
        let slot = token.index as usize;
        let read = SlotRead {
            offset: request.at.offset,
            len: request.bytes as u32,
            slot,
            may_block: source.may_block(request.at),
        };
        let fd = source.direct(request.at);
        let started = self.ring.read_into_slot(fd, read, token).is_ok();
        if !started {
            self.jobs.finish(token);
            self.jobs.release(slot);
        }
        started
    }
}
