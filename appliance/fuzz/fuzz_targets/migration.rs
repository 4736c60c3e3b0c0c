//! What a VMM sends when its guest is taken: whatever is accepted comes in its order and within its
//! bounds, memory that is accepted can be served, and what is kept of a guest is found again.

#![no_main]

use appliance::vmm::cloud_hypervisor::protocol::{Follows, HEADER_BYTES, Receiving, SLOT_BYTES};
use appliance::vmm::cloud_hypervisor::{Contents, Layout};
use libfuzzer_sys::fuzz_target;
use snapshot_format::{PageCount, PageSize};
use uffd_engine::region::RegionTable;

const MEMORY_BYTES: u64 = 64 << 20;

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(length)?;
    *rest = left;
    Some(taken)
}

/// The parts of a migration, if it is one.
fn received(mut rest: &[u8]) -> Option<Contents> {
    let mut receiving = Receiving::default();
    let (mut config, mut state, mut slots) = (Vec::new(), Vec::new(), 0);
    loop {
        let header = take(&mut rest, HEADER_BYTES)?.try_into().ok()?;
        match receiving.request(header).ok()? {
            Follows::Nothing => {}
            Follows::Slot => {
                take(&mut rest, SLOT_BYTES)?;
                slots += 1;
            }
            Follows::Config(length) => config = take(&mut rest, length)?.to_vec(),
            Follows::State(length) => state = take(&mut rest, length)?.to_vec(),
            Follows::End => break,
        }
    }
    assert!(slots > 0 && !config.is_empty() && !state.is_empty());
    // Nothing comes after the end.
    assert!(receiving.request([1; HEADER_BYTES]).is_err());
    Some(Contents { config, state })
}

fuzz_target!(|data: &[u8]| {
    if let Ok(contents) = Contents::unpack(data) {
        assert_eq!(contents.pack(), data);
    }
    let Some(contents) = received(data) else {
        return;
    };
    assert_eq!(Contents::unpack(&contents.pack()).unwrap(), contents);
    let Ok(mut config) = contents.config() else {
        return;
    };
    let Ok(layout) = Layout::of(&config, MEMORY_BYTES) else {
        return;
    };
    let page = PageSize::Size4K.bytes();
    let pages = PageCount::new(MEMORY_BYTES / page);
    RegionTable::new(&layout.regions(), page, pages).expect("memory that is accepted is served");
    layout.put_into_one_file(&mut config);
    let again = Layout::of(&config, MEMORY_BYTES).expect("only offsets have changed");
    for (mapping, place) in again.places() {
        assert_eq!(mapping.file_offset, place.start);
    }
});
