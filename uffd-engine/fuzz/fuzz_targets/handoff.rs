//! A VMM's hand-off: whatever is accepted is memory of exactly the build's size, and every
//! address of it means one page.

#![no_main]

use libfuzzer_sys::fuzz_target;
use snapshot_format::{PageCount, PageIndex};
use uffd_engine::address::HostAddr;
use uffd_engine::handoff::{self, Progress};
use uffd_engine::region::{ClaimedRegion, RegionTable};

fn check(claims: &[ClaimedRegion], page_bytes: u64, pages: u64) {
    let Ok(table) = RegionTable::new(claims, page_bytes, PageCount::new(pages)) else {
        return;
    };
    let total: u64 = table
        .regions()
        .iter()
        .map(|region| region.pages.get())
        .sum();
    assert_eq!(total, pages);
    // Both ends of each region, there and back.
    for region in table.regions() {
        for into in [0, region.pages.get() - 1] {
            let page = PageIndex::new(region.first_page.get() + into);
            let (addr, left) = table.addr_of(page);
            assert_eq!(left.get(), region.pages.get() - into);
            for at in [0, page_bytes - 1] {
                let addr = HostAddr::new(addr.get() + at);
                assert_eq!(table.page_at(addr), Some(page));
            }
        }
        let end = HostAddr::new(region.base.get() + region.pages.get() * page_bytes);
        for (first, count) in table.pages_in(region.base, end) {
            assert!(first.get() + count.get() <= pages);
        }
    }
    // A whole address space given back names every page once.
    let all = table.pages_in(HostAddr::new(0), HostAddr::new(u64::MAX));
    assert_eq!(all.map(|(_, count)| count.get()).sum::<u64>(), pages);
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(Progress::Complete(claims)) = handoff::parse(bytes) else {
        return;
    };
    // What is written for them reads back.
    let Ok(Progress::Complete(again)) = handoff::parse(&handoff::message(&claims)) else {
        panic!("our own message is not understood");
    };
    assert_eq!(again, claims);
    for page_bytes in [4096, 2 << 20] {
        // The size that would fit, so that the checks behind it are reached, and a fixed one.
        let sum = claims
            .iter()
            .fold(0u64, |sum, claim| sum.saturating_add(claim.size));
        check(&claims, page_bytes, sum / page_bytes);
        check(&claims, page_bytes, 64);
    }
});
