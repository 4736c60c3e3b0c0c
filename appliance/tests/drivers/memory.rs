//! What a guest has in its memory is there after every pause and resume, whatever becomes of its engine.

use std::fs;
use std::time::Duration;

use crate::support::daemon::Daemon;
use crate::support::fake::each::needs_fakes;
use crate::support::fake::subject::{Inside, Subject, place, use_fakes};
use crate::support::fake::{Fake, Kind, Vmm};
use crate::support::procs;
use crate::{PLAYER, start};

/// Ten pauses and resumes; what was written, given back and left alone is all there.
fn cycles(subject: &Subject) {
    let api = &subject.daemon.api;
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 512, 1);
    for cycle in 0..10u64 {
        // Over what was there, and where nothing was; one part goes away again.
        inside.fill(96 + cycle * 40, 24, 100 + cycle);
        inside.fill(4096 + cycle * 64, 8, 200 + cycle);
        inside.give_back(80 + cycle * 16, 4);
        let (hash, count) = (inside.hash(), inside.count());
        let paused = api.pause("one").expect(200);
        assert_eq!(paused["generation"], cycle, "{paused}");
        let stored = api.get("/v1/sandboxes/one/memory").expect(200)["diff_pages"].clone();
        if cycle > 0 {
            let stored = stored.as_u64().unwrap();
            assert!(stored <= 24 + 8 + 4 + 2, "cycle {cycle}: {stored} pages");
        }
        api.resume("one").expect(200);
        inside.runs_on_from(count);
        assert_eq!(inside.hash(), hash, "cycle {cycle}");
    }
}

pub(super) fn memory_survives_ten_cycles(instance: &str, pool: u16, vmm: Vmm) {
    let subject = start(instance, pool, Kind::usual(vmm));
    cycles(&subject);
    let log = fs::read_to_string(&subject.place.log).unwrap();
    let said = match vmm {
        Vmm::Firecracker => "WriteProtect",
        Vmm::CloudHypervisor => "Comparison",
    };
    assert!(log.contains(said), "{log}");
    subject.end();
}

#[test]
fn memory_survives_ten_cycles_where_no_state_is_had_without_it() {
    needs_fakes!("memory::memory_survives_ten_cycles_where_no_state_is_had_without_it");
    let kind = Kind {
        able: false,
        ..Kind::FIRECRACKER
    };
    let subject = start("tfcycb", 153, kind);
    let host = subject.daemon.api.get("/v1/host").expect(200);
    let reason = host["vmm"]["reason"].as_str().unwrap();
    assert!(
        reason.contains("memory is saved by Firecracker"),
        "{reason}"
    );
    cycles(&subject);
    subject.end();
}

pub(super) fn memory_survives_ten_cycles_without_knowing_its_writes(
    instance: &str,
    pool: u16,
    vmm: Vmm,
) {
    let place = place(instance, pool, vmm);
    place.reconfigure(&[("check_writes = true", "track_writes = false")]);
    let fake = Fake::new(&place, PLAYER, Kind::usual(vmm));
    use_fakes(&place, &[&fake], vmm);
    let daemon = Daemon::start(&place);
    let subject = Subject {
        place,
        fake,
        daemon,
    };
    cycles(&subject);
    subject.end();
}

#[test]
fn memory_survives_ten_cycles_in_a_cloud_hypervisor_that_asks_for_no_pages() {
    needs_fakes!("memory::memory_survives_ten_cycles_in_a_cloud_hypervisor_that_asks_for_no_pages");
    let subject = start("tccycb", 220, Kind::OLD_CLOUD_HYPERVISOR);
    let api = &subject.daemon.api;
    let host = api.get("/v1/host").expect(200);
    let reason = host["vmm"]["reason"].as_str().unwrap();
    assert!(
        reason.contains("reads all memory out of a file"),
        "{reason}"
    );
    cycles(&subject);
    // It doesn't keep a guest that was taken, unless that is refused.
    let inside = Inside::of(&api.sandbox("one").expect(200));
    let (hash, count) = (inside.hash(), inside.count());
    api.snapshot("one", "warm").expect(201);
    inside.runs_on_from(count);
    assert_eq!(inside.hash(), hash);
    let two = Inside::of(&api.create("two", "warm"));
    assert_eq!(two.hash(), hash);
    subject.end();
}

pub(super) fn a_guest_waits_for_an_engine_that_is_slow(instance: &str, pool: u16, vmm: Vmm) {
    let subject = start(instance, pool, Kind::usual(vmm));
    let api = &subject.daemon.api;
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 512, 1);
    let hash = inside.hash();
    api.pause("one").expect(200);
    api.resume("one").expect(200);
    let engine = procs::engine(&subject.place).expect("an engine");
    engine.signal(libc::SIGSTOP);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| inside.hash());
        std::thread::sleep(Duration::from_millis(500));
        assert!(
            !asking.is_finished(),
            "its memory was there without an engine"
        );
        engine.signal(libc::SIGCONT);
        assert_eq!(asking.join().unwrap(), hash);
    });
    subject.end();
}

pub(super) fn memory_survives_engines_that_die_between_its_writes(
    instance: &str,
    pool: u16,
    vmm: Vmm,
) {
    let subject = start(instance, pool, Kind::usual(vmm));
    let api = &subject.daemon.api;
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 512, 1);
    for cycle in 0..4 {
        api.pause("one").expect(200);
        api.resume("one").expect(200);
        // Written before, and written only under the successor; read before, and not at all.
        inside.fill(64 + cycle * 8, 8, 10 + cycle);
        procs::engine(&subject.place).expect("an engine").kill();
        inside.fill(200 + cycle * 8, 8, 20 + cycle);
        inside.fill(4096 + cycle * 8, 8, 30 + cycle);
        inside.give_back(300 + cycle * 4, 4);
        let hash = inside.hash();
        api.pause("one").expect(200);
        api.resume("one").expect(200);
        assert_eq!(inside.hash(), hash, "cycle {cycle}");
    }
    subject.end();
}
