//! Page requests as they come over the socket, and which of them wait for an answer.
//!
//! ```text
//!   bytes ─▶ 32 of them ─▶ pages, checked ─▶ events, each page once ─▶ all there? ─▶ answer
//!                                               ▲                                (in order)
//!                           pages to try again ─┘
//! ```

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use snapshot_format::PageIndex;

use crate::address::HostAddr;
use crate::region::RegionTable;

const PAGE_FAULT: u16 = 9;
/// Header of a request and of a response; a `PageFault` has a range of the same size behind it.
pub(crate) const HEADER_BYTES: usize = 16;
pub(crate) const REQUEST_BYTES: usize = 2 * HEADER_BYTES;
/// Pages of one request: more is not a fault.
const MAX_REQUEST_PAGES: u64 = 512;
/// Requests without an answer: more is not a VMM, whose threads wait for one each.
const MAX_WAITING: usize = 4096;

/// All requests of one VMM that have no answer yet.
#[derive(Debug, Default)]
pub struct Requests {
    partial: [u8; REQUEST_BYTES],
    received: usize,
    waiting: VecDeque<Range<u64>>,
    /// Of how many of the oldest every page was made an event, and of the next one how many.
    told: usize,
    told_of_next: u64,
    again: VecDeque<u64>,
}

impl Requests {
    /// Where the next bytes go; never empty.
    #[must_use]
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.partial[self.received..]
    }

    /// So many bytes came; the pages of the request that they complete, if they do.
    ///
    /// # Errors
    /// `InvalidData` for what is no page request, or none of this guest's.
    pub fn received(
        &mut self,
        bytes: usize,
        regions: &RegionTable,
    ) -> io::Result<Option<Range<u64>>> {
        self.received += bytes;
        if self.received < REQUEST_BYTES {
            return Ok(None);
        }
        self.received = 0;
        if self.waiting.len() == MAX_WAITING {
            return Err(invalid(format!(
                "more than {MAX_WAITING} page requests wait for an answer"
            )));
        }
        let pages = pages_of(&self.partial, regions)?;
        self.waiting.push_back(pages.clone());
        Ok(Some(pages))
    }

    /// The next page that nobody was told of and that isn't there.
    pub fn next_page(&mut self, is_filled: impl Fn(u64) -> bool) -> Option<u64> {
        while let Some(page) = self.again.pop_front() {
            if !is_filled(page) {
                return Some(page);
            }
        }
        while let Some(request) = self.waiting.get(self.told) {
            let page = request.start + self.told_of_next;
            if page == request.end {
                self.told += 1;
                self.told_of_next = 0;
                continue;
            }
            self.told_of_next += 1;
            if !is_filled(page) {
                return Some(page);
            }
        }
        None
    }

    /// A page is to be tried again, if somebody waits for it.
    pub fn try_again(&mut self, page: u64) {
        if self.waiting.iter().any(|request| request.contains(&page)) {
            self.again.push_back(page);
        }
    }

    /// Whether [`Self::next_page`] may have another.
    #[must_use]
    pub fn has_next(&self) -> bool {
        !self.again.is_empty() || self.told < self.waiting.len()
    }

    /// How many wait for an answer.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether all pages of the oldest request are there.
    #[must_use]
    pub fn is_done(&self, is_filled: impl Fn(u64) -> bool) -> bool {
        let oldest = self.waiting.front();
        oldest.is_some_and(|request| request.clone().all(is_filled))
    }

    /// Takes the oldest request if all of its pages are there; `false` when it isn't so.
    pub fn take_done(&mut self, is_filled: impl Fn(u64) -> bool) -> bool {
        let done = self.is_done(is_filled);
        if done {
            self.waiting.pop_front();
            match self.told.checked_sub(1) {
                Some(told) => self.told = told,
                None => self.told_of_next = 0,
            }
        }
        done
    }
}

/// The pages of a request, checked.
fn pages_of(request: &[u8; REQUEST_BYTES], regions: &RegionTable) -> io::Result<Range<u64>> {
    let word = |at: usize| {
        let bytes = request[at..at + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    };
    let command = u16::from_le_bytes([request[0], request[1]]);
    if command != PAGE_FAULT || word(8) != HEADER_BYTES as u64 {
        let length = word(8);
        return Err(invalid(format!(
            "command {command} with {length} bytes is no page request"
        )));
    }
    let (gpa, length) = (word(16), word(24));
    let pages = length.div_ceil(regions.page_bytes());
    let fits = |first: PageIndex| pages <= regions.addr_of(first).1.get();
    match regions.page_at(HostAddr::new(gpa)) {
        Some(first) if (1..=MAX_REQUEST_PAGES).contains(&pages) && fits(first) => {
            Ok(first.get()..first.get() + pages)
        }
        _ => Err(invalid(format!(
            "{length} bytes at guest address {gpa:#x} are not the guest's"
        ))),
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::ClaimedRegion;
    use proptest::prelude::*;
    use snapshot_format::PageCount;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 64;

    fn regions() -> RegionTable {
        let claim = ClaimedRegion {
            base: 0,
            size: PAGES * PAGE,
            offset: 0,
            page_size: PAGE,
        };
        RegionTable::new(&[claim], PAGE, PageCount::new(PAGES)).unwrap()
    }

    fn bytes(command: u16, gpa: u64, length: u64) -> Vec<u8> {
        let mut request = vec![0u8; 8];
        request[..2].copy_from_slice(&command.to_le_bytes());
        for word in [16, gpa, length] {
            request.extend_from_slice(&word.to_le_bytes());
        }
        request
    }

    fn give(requests: &mut Requests, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = requests.room();
            let part = room.len().min(bytes.len());
            room[..part].copy_from_slice(&bytes[..part]);
            requests.received(part, &regions())?;
            bytes = &bytes[part..];
        }
        Ok(())
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for (command, gpa, length) in [
            (3, 0, PAGE),
            (PAGE_FAULT, PAGES * PAGE, PAGE),
            (PAGE_FAULT, (PAGES - 1) * PAGE, 2 * PAGE),
            (PAGE_FAULT, 0, 0),
            (PAGE_FAULT, 0, u64::MAX),
        ] {
            let refused = give(&mut Requests::default(), &bytes(command, gpa, length));
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let mut many = Requests::default();
        let refused = (0..=MAX_WAITING).find_map(|_| {
            let given = give(&mut many, &bytes(PAGE_FAULT, 0, PAGE));
            given.err()
        });
        assert!(refused.unwrap().to_string().contains("wait for an answer"));
    }

    proptest! {
        /// However the bytes are cut and the pages come: every page of a request is an event
        /// until it is filled, and answers come in order, one each.
        #[test]
        fn every_request_is_answered_once_in_order(
            asked in prop::collection::vec((0..PAGES - 8, 1..8u64), 1..20),
            cut in 1..40usize,
            refuse in prop::collection::vec(any::<bool>(), 64),
        ) {
            let mut requests = Requests::default();
            let all: Vec<u8> = asked
                .iter()
                .flat_map(|(first, pages)| bytes(PAGE_FAULT, first * PAGE, pages * PAGE))
                .collect();
            let mut filled = vec![false; PAGES as usize];
            let mut answered = 0;
            let mut refuse = refuse.into_iter();
            for part in all.chunks(cut) {
                give(&mut requests, part).unwrap();
                while let Some(page) = requests.next_page(|page| filled[page as usize]) {
                    prop_assert!(!filled[page as usize]);
                    if refuse.next() == Some(true) {
                        requests.try_again(page);
                    } else {
                        filled[page as usize] = true;
                    }
                }
                prop_assert!(!requests.has_next());
                while requests.take_done(|page| filled[page as usize]) {
                    let (first, pages) = asked[answered];
                    prop_assert!((first..first + pages).all(|page| filled[page as usize]));
                    answered += 1;
                }
            }
            prop_assert_eq!(answered, asked.len());
        }
    }
}
