//! Dirty sets against the real kernel: what each source says, and that a self-check notices when
//! one says too little.

mod support;

use std::fs::File;

use snapshot_format::{PageCount, PageIndex};
use support::{Guest, Host, PAGE, content, has_uffd, skip};
use uffd_engine::control::Report;
use uffd_engine::dirty_set::{DirtySet, DirtySource};
use uffd_engine::region::RegionTable;
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, FEATURE_WP_ASYNC, Uffd};
use uffd_engine::vmm_side::GuestMemory;
use uffd_engine::{PageState, PageStates, Tracking};

const PAGES: u64 = 512;

fn table() -> PageStates {
    PageStates::create(PageCount::new(PAGES)).unwrap()
}

fn regions(guest: &Guest) -> RegionTable {
    RegionTable::new(&[guest.memory.as_region()], PAGE, PageCount::new(PAGES)).unwrap()
}

fn numbers(set: &DirtySet) -> Vec<u64> {
    set.pages().iter().map(|page| page.get()).collect()
}

fn truth(host: &Host, guest: &Guest, states: &PageStates) -> DirtySet {
    let memory = File::open("/proc/self/mem").unwrap();
    let parent = host.store.open(&host.build).unwrap();
    DirtySet::of_comparison(&memory, &regions(guest), states, &parent).unwrap()
}

/// Reads and writes all over the memory; what differs from the build afterwards.
fn work(guest: &Guest) -> Vec<u64> {
    for page in 0..PAGES {
        if page % 5 != 0 {
            guest.check(page);
        }
    }
    // Written after it was read, and written before it was ever read; zero in the build, and not.
    let written = [1, 3, 7, 10, 55, 99, 100, 500];
    for page in written {
        guest.memory.write(page * PAGE + 128, 0xD1);
    }
    guest.memory.give_back(200 * PAGE, 8 * PAGE).unwrap();
    assert_eq!(guest.memory.read(201 * PAGE), 0);
    let gone = (200..208).filter(|page| content(*page).is_some());
    let mut differs: Vec<u64> = written.into_iter().chain(gone).collect();
    differs.sort_unstable();
    differs
}

#[test]
fn write_protection_names_what_differs_and_little_more() {
    if !has_uffd("write_protection_names_what_differs_and_little_more") {
        return;
    }
    let mut host = Host::start(PAGES);
    let states = table();
    let guest = host.attach("s1", &states);
    // Installed before anybody tracked: might have been written.
    guest.check(400);
    // A thread goes on before the table is written; an answer comes after that.
    host.stats("s1");
    let before: Vec<u64> = (0..PAGES)
        .filter(|page| states.get(PageIndex::new(*page)).is_installed())
        .collect();
    let report = host.track("s1", Tracking::Events);
    assert!(matches!(report, Report::Stats { .. }), "{report:?}");
    let differs = work(&guest);
    host.stats("s1");
    let tracked = DirtySet::of_tracked(&states);
    assert_eq!(tracked.source, DirtySource::WriteProtect);
    let mut expected = differs.clone();
    expected.extend(before);
    // Zero in the build and given back: no difference, but nothing tells.
    expected.extend((200..208).filter(|page| content(*page).is_none()));
    expected.sort_unstable();
    expected.dedup();
    assert_eq!(numbers(&tracked), expected);

    let truth = truth(&host, &guest, &states);
    assert_eq!(numbers(&truth), differs);
    tracked.self_check(&truth).unwrap();

    // A table that lost one write is found out.
    states.set(PageIndex::new(55), PageState::Clean);
    let divergence = DirtySet::of_tracked(&states)
        .self_check(&truth)
        .unwrap_err();
    assert_eq!((divergence.page.get(), divergence.missed), (55, 1));
}

#[test]
fn many_threads_writing_at_once_are_all_seen() {
    if !has_uffd("many_threads_writing_at_once_are_all_seen") {
        return;
    }
    let mut host = Host::start(PAGES);
    let states = table();
    let guest = host.attach("s1", &states);
    host.track("s1", Tracking::Events);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let memory = &guest.memory;
            scope.spawn(move || {
                for page in (0..PAGES).filter(|page| page % 3 != 0) {
                    memory.write(page * PAGE + 64 + thread * 8, thread + 1);
                    assert_eq!(memory.read(page * PAGE + 64 + thread * 8), thread + 1);
                }
            });
        }
        scope.spawn(|| (0..PAGES).for_each(|page| guest.check(page)));
    });
    host.stats("s1");
    let written: Vec<u64> = (0..PAGES).filter(|page| page % 3 != 0).collect();
    assert_eq!(numbers(&DirtySet::of_tracked(&states)), written);
    assert_eq!(numbers(&truth(&host, &guest, &states)), written);
}

#[test]
fn the_page_table_names_what_was_written_where_writes_are_asynchronous() {
    const NAME: &str = "the_page_table_names_what_was_written_where_writes_are_asynchronous";
    if !has_uffd(NAME) {
        return;
    }
    let uffd = match Uffd::create(FEATURE_EVENT_REMOVE | FEATURE_WP_ASYNC) {
        Ok(uffd) => uffd,
        Err(error) => return skip(NAME, &format!("no asynchronous write-protection: {error}")),
    };
    let mut host = Host::start(PAGES);
    let states = table();
    let memory = GuestMemory::anonymous(PAGES * PAGE).unwrap();
    let guest = host.attach_uffd("s1", &states, memory, &uffd);
    let report = host.track("s1", Tracking::Kernel);
    assert!(matches!(report, Report::Stats { .. }), "{report:?}");
    let differs = work(&guest);
    host.stats("s1");
    let pid = std::process::id() as i32;
    let scanned = DirtySet::of_pagemap(pid, &regions(&guest), &states).unwrap();
    assert_eq!(scanned.source, DirtySource::PagemapScan);
    let truth = truth(&host, &guest, &states);
    assert_eq!(numbers(&truth), differs);
    scanned.self_check(&truth).unwrap();
    let more = scanned.pages().len() - truth.pages().len();
    assert!(more <= 2 + 16, "{:?}", numbers(&scanned));
}
