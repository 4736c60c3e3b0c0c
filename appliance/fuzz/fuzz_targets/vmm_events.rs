//! A VMM's event monitor: events are the same however their bytes are cut.

#![no_main]

use appliance::vmm::cloud_hypervisor::{Decoder, Event};
use libfuzzer_sys::fuzz_target;

fn decoded(bytes: &[u8], piece: usize) -> Option<Vec<Event>> {
    let mut decoder = Decoder::default();
    let mut events = Vec::new();
    for part in bytes.chunks(piece) {
        events.extend(decoder.feed(part)?);
    }
    Some(events)
}

fuzz_target!(|data: &[u8]| {
    // The first byte says in how large pieces the rest comes.
    let Some((piece, rest)) = data.split_first() else {
        return;
    };
    let whole = decoded(rest, rest.len().max(1));
    let cut = decoded(rest, usize::from(*piece).max(1));
    if let (Some(whole), Some(cut)) = (whole, cut) {
        assert_eq!(whole, cut);
    }
});
