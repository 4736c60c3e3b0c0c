//! A VMM's page requests: whatever is accepted asks for pages of the guest, each request is
//! answered once all of its pages are there and not before, and what comes in is bounded.

#![no_main]

use libfuzzer_sys::fuzz_target;
use snapshot_format::PageCount;
use uffd_engine::postcopy::requests::Requests;
use uffd_engine::region::{ClaimedRegion, RegionTable};

const PAGE: u64 = 4096;
const PAGES: u64 = 1024;

/// Two regions with a hole between them, as a guest of Cloud Hypervisor has.
fn regions() -> RegionTable {
    let region = |base, first: u64, pages: u64| ClaimedRegion {
        base,
        size: pages * PAGE,
        offset: first * PAGE,
        page_size: PAGE,
    };
    let claims = [region(0, 0, 768), region(1 << 32, 768, 256)];
    RegionTable::new(&claims, PAGE, PageCount::new(PAGES)).expect("they cover all pages")
}

fuzz_target!(|data: &[u8]| {
    // The first byte says in how large pieces the rest comes.
    let Some((piece, mut rest)) = data.split_first() else {
        return;
    };
    let piece = usize::from(*piece).max(1);
    let regions = regions();
    let mut requests = Requests::default();
    let mut filled = vec![false; PAGES as usize];
    let (mut asked, mut answered) = (0, 0);
    while !rest.is_empty() {
        let room = requests.room();
        let part = room.len().min(piece).min(rest.len());
        room[..part].copy_from_slice(&rest[..part]);
        rest = &rest[part..];
        match requests.received(part, &regions) {
            Ok(None) => continue,
            Ok(Some(pages)) => {
                assert!(!pages.is_empty() && pages.end <= PAGES);
                asked += 1;
            }
            Err(_) => return,
        }
        // Every second page is refused once.
        while let Some(page) = requests.next_page(|page| filled[page as usize]) {
            if page % 2 == 1 && !filled[page as usize - 1] {
                filled[page as usize - 1] = true;
                requests.try_again(page);
            } else {
                filled[page as usize] = true;
            }
        }
        assert!(!requests.has_next());
        while requests.take_done(|page| filled[page as usize]) {
            answered += 1;
        }
        assert_eq!(asked, answered);
    }
});
