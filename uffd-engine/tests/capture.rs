//! Pauses of a guest whose memory is a shared file, against the real kernel: what is written is
//! exactly what differs, however little of the memory is looked at.

mod support;

use std::os::unix::fs::FileExt;

use snapshot_format::{PageCount, PageIndex};
use support::shared::{PAGES, Shared, ram, start, table, write_build};
use support::{Host, PAGE, content, has_uffd};
use uffd_engine::control::Report;
use uffd_engine::dirty::{Capture, CaptureError};
use uffd_engine::dirty_set::{DirtySource, UnwrittenPages};
use uffd_engine::memory_image::{MemoryImage, ProcessMemory};
use uffd_engine::region::RegionTable;
use uffd_engine::{PageState, Tracking};

/// Reads four pages of five; writes some of them, and some that it has not read.
fn work(shared: &Shared) -> u64 {
    for page in (0..PAGES).filter(|page| page % 5 != 0) {
        shared.guest.check(page);
    }
    let written = [1, 3, 7, 10, 55, 99, 100, 500];
    for page in written {
        shared.guest.memory.write(page * PAGE + 128, 0xD1);
    }
    written.len() as u64
}

#[test]
fn only_written_pages_are_read_and_the_build_is_the_memory() {
    let Some(mut shared) = start("only_written_pages_are_read_and_the_build_is_the_memory") else {
        return;
    };
    let written = work(&shared);
    shared.give_back(200, 8);
    shared.host.stats("s1");
    let unwritten = shared.unwritten();
    let (captured, build) = shared.capture(Some(&unwritten), true).unwrap();
    assert_eq!(captured.source, DirtySource::PagemapScan);
    assert_eq!(captured.compared.get(), written, "{captured:?}");
    assert!(captured.unwritten.get() > PAGES / 2, "{captured:?}");
    shared.assert_is_the_memory(&build);

    // The truth agrees, and is dearer.
    let (compared, build) = shared.capture(None, false).unwrap();
    assert_eq!(compared.source, DirtySource::Comparison);
    assert!(compared.compared.get() > PAGES / 2, "{compared:?}");
    shared.assert_is_the_memory(&build);
}

#[test]
fn a_write_that_the_kernel_does_not_know_of_is_found_by_the_check() {
    let Some(mut shared) = start("a_write_that_the_kernel_does_not_know_of_is_found_by_the_check")
    else {
        return;
    };
    work(&shared);
    shared.host.stats("s1");
    // Past the page table that is scanned.
    let page = 402;
    shared.ram.write_all_at(&[7; 8], page * PAGE + 64).unwrap();
    let unwritten = shared.unwritten();
    assert!(unwritten.has(PageIndex::new(page)));
    let error = shared.capture(Some(&unwritten), true).unwrap_err();
    let CaptureError::Divergence(divergence) = error else {
        panic!("{error:?}")
    };
    assert_eq!(divergence.page.get(), page);
    let (_, build) = shared.capture(None, true).unwrap();
    shared.assert_is_the_memory(&build);
}

#[test]
fn a_successor_engine_goes_on_protecting() {
    let Some(mut shared) = start("a_successor_engine_goes_on_protecting") else {
        return;
    };
    for page in 0..PAGES / 2 {
        shared.guest.check(page);
    }
    shared.host.replace_engine();
    let (guest, states) = (&shared.guest, &shared.states);
    shared
        .host
        .adopt_tracking("s1", guest, states, Tracking::Kernel);
    for page in PAGES / 2..PAGES {
        shared.guest.check(page);
    }
    shared.guest.memory.write(300 * PAGE, 1);
    shared.host.stats("s1");
    let unwritten = shared.unwritten();
    let (captured, build) = shared.capture(Some(&unwritten), true).unwrap();
    assert_eq!(captured.compared.get(), 1, "{captured:?}");
    shared.assert_is_the_memory(&build);
}

/// An engine installs what it had read ahead while the memory is captured: whatever the capture
/// sees of that, the pages are the parent's.
#[test]
fn pages_that_appear_during_a_capture_are_the_parents() {
    let host = Host::start(PAGES);
    let parent = host.store.open(&host.build).unwrap();
    for _ in 0..100 {
        let (ram, states) = (ram(), table());
        let (captured, build) = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut bytes = vec![0; PAGE as usize];
                // Downwards, so that what was a hole when the capture looked fills from its end.
                for page in (0..PAGES).rev() {
                    parent.read_page(PageIndex::new(page), &mut bytes).unwrap();
                    ram.write_all_at(&bytes, page * PAGE).unwrap();
                    states.set(PageIndex::new(page), PageState::Clean);
                }
            });
            let memory = MemoryImage::File(ram.try_clone().unwrap());
            let capture = Capture {
                memory: &memory,
                pages: PageCount::new(PAGES),
                page_bytes: PAGE,
                states: Some(&states),
                unwritten: None,
                check: None,
            };
            while states.get(PageIndex::new(PAGES - 1)) == PageState::Missing {
                std::hint::spin_loop();
            }
            write_build(&host, |writer| capture.write(writer)).unwrap()
        });
        let mut bytes = vec![0; PAGE as usize];
        for page in 0..PAGES {
            build.read_page(PageIndex::new(page), &mut bytes).unwrap();
            let word = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert_eq!(
                word,
                content(page).unwrap_or(0),
                "page {page}; {captured:?}"
            );
        }
    }
}

/// A guest as Firecracker's: anonymous memory, nothing but removals asked for.
#[test]
fn memory_inside_a_vmm_is_captured_with_and_without_knowing_its_writes() {
    const NAME: &str = "memory_inside_a_vmm_is_captured_with_and_without_knowing_its_writes";
    if !has_uffd(NAME) {
        return;
    }
    for tracked in [true, false] {
        let mut host = Host::start(PAGES);
        let states = table();
        let guest = host.attach("s1", &states);
        if tracked {
            let report = host.track("s1", Tracking::Events);
            assert!(matches!(report, Report::Stats { .. }), "{report:?}");
        }
        for page in (0..PAGES / 2).filter(|page| page % 5 != 0) {
            guest.check(page);
        }
        let written = [1, 3, 7, 10, 55, 99, 100, 500];
        for page in written {
            guest.memory.write(page * PAGE + 128, 0xD1);
        }
        guest.memory.give_back(200 * PAGE, 8 * PAGE).unwrap();
        assert_eq!(guest.memory.read(201 * PAGE), 0);
        host.stats("s1");

        let pages = PageCount::new(PAGES);
        let regions = RegionTable::new(&[guest.memory.as_region()], PAGE, pages).unwrap();
        let pid = std::process::id() as i32;
        let memory = MemoryImage::Process(ProcessMemory::open(pid, regions).unwrap());
        let parent = host.store.open(&host.build).unwrap();
        let before = memory.present(pages, PAGE).unwrap();
        let unwritten = tracked.then(|| UnwrittenPages::of_tracked(&states));
        let capture = Capture {
            memory: &memory,
            pages,
            page_bytes: PAGE,
            states: Some(&states),
            unwritten: unwritten.as_ref(),
            check: Some(&parent),
        };
        let (captured, build) = write_build(&host, |writer| capture.write(writer)).unwrap();
        // Nothing was brought in to be looked at.
        assert_eq!(memory.present(pages, PAGE).unwrap(), before);
        if tracked {
            assert_eq!(captured.source, DirtySource::WriteProtect);
            // And the page that was read after it was given back.
            let compared = written.len() as u64 + 1;
            assert_eq!(captured.compared.get(), compared, "{captured:?}");
        } else {
            assert_eq!(captured.source, DirtySource::Comparison);
            assert_eq!(captured.compared, before, "{captured:?}");
        }
        let mut bytes = vec![0; PAGE as usize];
        for page in 0..PAGES {
            build.read_page(PageIndex::new(page), &mut bytes).unwrap();
            for (index, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
                let ours = guest.memory.read(page * PAGE + index as u64 * 8);
                assert_eq!(u64::from_le_bytes(*word), ours, "page {page}, word {index}");
            }
        }
    }
}
