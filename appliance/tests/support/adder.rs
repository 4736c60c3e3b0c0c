//! A guest of a few instructions that knows whether its memory is right: it numbers 256 pages once;
//! then, for ever, it counts a round, adds the numbers up, compares the sum with what it has to be,
//! writes the round into one of the pages, and says `ok` or `X`. What it has written is looked up
//! in its builds.

use std::time::Duration;

use serde_json::Value;
use snapshot_format::{BuildStore, PageIndex};

use super::place::Place;

pub(crate) const PAGE: u64 = 4096;
/// Where the guest counts its rounds, and after that the rounds in which its memory was wrong.
pub(crate) const COUNTER: u64 = 0x20_0000;
/// Where its numbered pages begin, and how many there are.
pub(crate) const NUMBERED: u64 = 0x100_0000;
pub(crate) const NUMBERS: u64 = 256;
/// 1 + 2 + … + 256.
pub(crate) const SUM: u32 = 0x8080;

/// What a guest has written, as its build has it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Written {
    pub(crate) rounds: u64,
    pub(crate) wrong: u64,
    /// The last round that is in one of the pages.
    pub(crate) newest: u64,
}

/// Looks into a build.
pub(crate) fn written(place: &Place, paused: &Value) -> Written {
    let store = BuildStore::open_or_create(&place.data.join("builds")).unwrap();
    let build = paused["build"].as_str().unwrap().parse().unwrap();
    let build = store.open(&build).unwrap();
    let page_bytes = build.map().page_size().bytes();
    let mut bytes = vec![0; page_bytes as usize];
    let mut words = |address: u64| -> [u64; 3] {
        let page = PageIndex::new(address / page_bytes);
        build.read_page(page, &mut bytes).unwrap();
        let first = (address % page_bytes) as usize;
        let word = |at: usize| u64::from_le_bytes(bytes[first + at..][..8].try_into().unwrap());
        [word(0), word(8), word(16)]
    };
    let [rounds, wrong, _] = words(COUNTER);
    let mut newest = 0;
    for number in 0..NUMBERS {
        let [_, is, round] = words(NUMBERED + number * PAGE);
        assert_eq!(is, number + 1, "page {number}");
        newest = newest.max(round);
    }
    Written {
        rounds,
        wrong,
        newest,
    }
}

/// Lets it run for some rounds: there are KVMs that take a microsecond for an instruction.
pub(crate) fn run() {
    std::thread::sleep(Duration::from_millis(300));
}
