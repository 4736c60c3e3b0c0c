//! A VMM that asks for pages over its socket, as Cloud Hypervisor does after
//! `receive-migration memory_mode=postcopy`; this process plays it.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};
use support::asking::{
    LOW_PAGES, PAGE_FAULT, PAGES, STATUS_ERROR, STATUS_OK, Vmm, attach, begin, gpa,
};
use support::{Host, PAGE, content, evict, resident_pages, skip};
use uffd_engine::control::Report;

#[test]
fn every_page_that_is_asked_for_is_in_the_memfd_when_the_answer_comes() {
    let mut host = Host::start(PAGES);
    let mut vmm = attach(&mut host, "ch");
    for page in (0..PAGES).rev().filter(|page| page % 3 == 0) {
        vmm.request(PAGE_FAULT, gpa(page), PAGE);
        assert_eq!(vmm.response(), STATUS_OK);
        vmm.check(page);
    }
    // Many at once, some of them there already, more than one turn takes; and the same again.
    for _ in 0..2 {
        vmm.request(PAGE_FAULT, 0, LOW_PAGES * PAGE);
        assert_eq!(vmm.response(), STATUS_OK);
        (0..LOW_PAGES).for_each(|page| vmm.check(page));
    }
    let stats = vmm.end(&mut host, "ch");
    assert!(stats.pages_installed >= LOW_PAGES, "{stats:?}");
}

#[test]
fn requests_that_wait_for_the_disk_are_all_answered_in_their_order() {
    const NAME: &str = "requests_that_wait_for_the_disk_are_all_answered_in_their_order";
    let mut host = Host::start(PAGES);
    evict(&host.data_file());
    if resident_pages(&host.data_file()).iter().all(|page| *page) {
        return skip(NAME, "the file system would not let go of its pages");
    }
    let mut vmm = attach(&mut host, "ch");
    for page in 0..PAGES {
        vmm.request(PAGE_FAULT, gpa(page), PAGE);
    }
    for page in 0..PAGES {
        assert_eq!(vmm.response(), STATUS_OK);
        vmm.check(page);
    }
    let stats = vmm.end(&mut host, "ch");
    assert!(stats.pages_read > 0, "{stats:?}");
    assert_eq!(stats.pages_installed, PAGES);
}

#[test]
fn what_the_guest_wrote_is_not_overwritten_and_what_it_gave_back_is_zero() {
    let mut host = Host::start(PAGES);
    let mut vmm = attach(&mut host, "ch");
    let ask = |vmm: &mut Vmm, page| {
        vmm.request(PAGE_FAULT, gpa(page), PAGE);
        assert_eq!(vmm.response(), STATUS_OK);
    };
    ask(&mut vmm, 8);
    vmm.check(8);
    vmm.memory.write_all_at(b"mine1234", 8 * PAGE).unwrap();
    ask(&mut vmm, 8);
    assert_eq!(vmm.word(8), u64::from_le_bytes(*b"mine1234"));
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&vmm.memory, punch, 8 * PAGE as i64, PAGE as i64).unwrap();
    ask(&mut vmm, 8);
    assert_eq!(vmm.word(8), 0, "it came back as it was in the build");
    vmm.end(&mut host, "ch");
}

#[test]
fn what_is_no_request_fails_the_session_with_a_reason_and_no_other() {
    let mut host = Host::start(PAGES);
    let mut good = attach(&mut host, "good");
    for (number, (command, gpa, length)) in [
        (3, 0, PAGE),
        (PAGE_FAULT, LOW_PAGES * PAGE, PAGE),
        (PAGE_FAULT, (LOW_PAGES - 1) * PAGE, 2 * PAGE),
        (PAGE_FAULT, 0, 0),
        (PAGE_FAULT, 0, u64::MAX),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("bad-{number}");
        let mut vmm = attach(&mut host, &name);
        vmm.request(command, gpa, length);
        match host.report().0 {
            Report::Failed { session, reason } => {
                assert_eq!(session, name);
                assert!(reason.contains("page request") || reason.contains("guest address"));
            }
            other => panic!("expected a failure, got {other:?}"),
        }
        host.detach(&name);
        good.request(PAGE_FAULT, 0, PAGE);
        assert_eq!(good.response(), STATUS_OK);
    }
    good.end(&mut host, "good");
}

#[test]
fn a_page_that_is_cut_off_its_build_is_an_error_for_the_vmm() {
    let mut host = Host::start(PAGES);
    let mut vmm = attach(&mut host, "ch");
    let data = File::options().write(true).open(host.data_file()).unwrap();
    data.set_len(PAGE).unwrap();
    let last = (0..PAGES).rev().find(|page| content(*page).is_some());
    vmm.request(PAGE_FAULT, gpa(last.unwrap()), PAGE);
    assert_eq!(vmm.response(), STATUS_ERROR);
    match host.report().0 {
        Report::Failed { session, .. } => assert_eq!(session, "ch"),
        other => panic!("expected a failure, got {other:?}"),
    }
}

#[test]
fn memory_that_is_too_short_is_refused() {
    let mut host = Host::start(PAGES);
    match begin(&mut host, "ch", (PAGES - 1) * PAGE).0 {
        Report::Refused { reason, .. } => assert!(reason.contains("memory file"), "{reason}"),
        other => panic!("expected a refusal, got {other:?}"),
    }
}
