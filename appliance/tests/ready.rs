//! VMMs that wait, started, for sandboxes: claimed by restores, replaced when they die, and never more
//! than they should be; over VMMs that are none (see `support/fake`), one body for each of them.

mod support;

use std::fs;
use std::time::Duration;

use support::daemon::Daemon;
use support::fake::each::over_each;
use support::fake::subject::{Inside, Subject, place};
use support::fake::{self, Fault, Kind, Vmm};
use support::procs::{self, Process};
use support::wait_for;

/// The test that a fake's process runs as.
const PLAYER: &str = "a_fake_waits_as_well";

over_each! {
    restores_find_a_vmm_that_waits("find", 190);
    one_that_died_is_replaced_and_handed_to_nobody("died", 191);
    one_that_fails_its_restore_leaves_the_sandbox_paused("fail", 192);
    those_of_a_killed_daemon_are_gone_when_the_next_one_is_there("kill", 193);
    none_wait_where_none_are_configured("none", 194);
}

#[test]
fn a_fake_waits_as_well() {
    fake::run_if_wanted();
}

fn start(instance: &str, pool: u16, vmm: Vmm) -> Subject {
    let place = place(instance, pool, vmm);
    place.reconfigure(&[("ready_slots = 0", "ready_slots = 2")]);
    Subject::start_in(place, Kind::usual(vmm), PLAYER)
}

/// The VMMs that wait.
fn waiting(subject: &Subject) -> Vec<Process> {
    let waits = format!("/{}/ready/", subject.place.instance);
    let all = procs::of(&subject.place).into_iter();
    all.filter(|process| process.is_vmm() && process.sees(&waits))
        .collect()
}

/// A number of the metrics.
fn metric(daemon: &Daemon, name: &str) -> u64 {
    let text = daemon.api.get("/metrics").expect(200);
    let text = text.as_str().unwrap().to_owned();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let line = line.unwrap_or_else(|| panic!("no {name} in:\n{text}"));
    line.parse().unwrap()
}

#[track_caller]
fn wait_until_ready(subject: &Subject, count: u64) {
    wait_for("VMMs wait", Duration::from_secs(30), || {
        (metric(&subject.daemon, "thaw_vmms_waiting") == count).then_some(())
    });
}

/// What the log says of the last restore.
fn last_restore(subject: &Subject) -> String {
    let log = fs::read_to_string(&subject.place.log).unwrap();
    let line = log.lines().rev().find(|line| line.contains("Restored"));
    line.expect("a restore is logged").to_owned()
}

fn restores_find_a_vmm_that_waits(instance: &str, pool: u16, vmm: Vmm) {
    let subject = start(instance, pool, vmm);
    let api = &subject.daemon.api;
    wait_until_ready(&subject, 2);
    // A boot takes none; the one of its slot ends.
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 128, 1);
    inside.call("POST", "/test/disk?word=7");
    wait_until_ready(&subject, 2);
    for cycle in 0..3 {
        let (hash, count) = (inside.hash(), inside.count());
        api.pause("one").expect(200);
        // Two for anybody, one for it.
        wait_until_ready(&subject, 3);
        api.resume("one").expect(200);
        let log = last_restore(&subject);
        assert!(log.contains("was_waiting=true"), "cycle {cycle}: {log}");
        inside.runs_on_from(count);
        assert_eq!(inside.hash(), hash, "cycle {cycle}");
        // Its own disk, and its own name.
        assert_eq!(inside.call("GET", "/test/disk"), 7 + cycle);
        inside.call("POST", &format!("/test/disk?word={}", 8 + cycle));
        let known = vmm.known_of("one", "base");
        assert_eq!(inside.call("GET", "/test/metadata"), known);
        inside.fill(64 + cycle * 100, 40, 5);
    }
    assert_eq!(metric(&subject.daemon, "thaw_vmms_claimed_total"), 3);

    let hash = inside.hash();
    api.snapshot("one", "warm").expect(201);
    wait_until_ready(&subject, 2);
    let two = Inside::of(&api.create("two", "warm"));
    assert!(last_restore(&subject).contains("was_waiting=true"));
    assert_eq!(two.hash(), hash);
    two.call("POST", "/test/disk?word=99");
    assert_eq!(inside.call("GET", "/test/disk"), 10);
    // What was claimed is saved as what was not.
    api.pause("two").expect(200);
    api.resume("two").expect(200);
    assert_eq!(two.hash(), hash);
    assert_eq!(metric(&subject.daemon, "thaw_vmms_lost_total"), 0);
    for id in ["one", "two"] {
        api.pause(id).expect(200);
    }
    subject.daemon.api.delete_all();
    subject.daemon.stop();
    assert_eq!(subject.place.leftovers(), Vec::<String>::new());
    assert_eq!(
        subject.place.leftovers_of_the_daemon(),
        Vec::<String>::new()
    );
}

fn one_that_died_is_replaced_and_handed_to_nobody(instance: &str, pool: u16, vmm: Vmm) {
    let subject = start(instance, pool, vmm);
    let api = &subject.daemon.api;
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 128, 1);
    let hash = inside.hash();
    wait_until_ready(&subject, 2);
    for _ in 0..3 {
        api.pause("one").expect(200);
        wait_until_ready(&subject, 3);
        // With or without the thread having noticed.
        waiting(&subject).iter().for_each(Process::kill);
        api.resume("one").expect(200);
        assert_eq!(inside.hash(), hash);
        let log = last_restore(&subject);
        assert!(log.contains("was_waiting=false"), "{log}");
        wait_until_ready(&subject, 2);
    }
    assert_eq!(metric(&subject.daemon, "thaw_vmms_lost_total"), 9);
    subject.daemon.api.delete_all();
    subject.daemon.stop();
    assert_eq!(
        subject.place.leftovers_of_the_daemon(),
        Vec::<String>::new()
    );
}

fn one_that_fails_its_restore_leaves_the_sandbox_paused(instance: &str, pool: u16, vmm: Vmm) {
    let subject = start(instance, pool, vmm);
    let api = &subject.daemon.api;
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 128, 1);
    let hash = inside.hash();
    api.pause("one").expect(200);
    subject.limit_disk("one");
    for call in vmm.restore_calls() {
        for fault in Fault::ALL {
            wait_until_ready(&subject, 3);
            subject.fake.fail_at(call, fault);
            let failed = api.resume("one");
            assert_eq!(failed.status, 500, "{call} {fault:?}: {}", failed.body);
            subject.fake.heal();
            let sandbox = api.sandbox("one").expect(200);
            assert_eq!(sandbox["state"], "paused", "{call} {fault:?}: {sandbox}");
            let left = support::place::names(&subject.place.run.join("sandboxes"));
            assert_eq!(left, Vec::<String>::new(), "{call} {fault:?}");
        }
    }
    wait_until_ready(&subject, 3);
    api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    let claimed = vmm.restore_calls().len() * Fault::ALL.len() + 1;
    let counted = metric(&subject.daemon, "thaw_vmms_claimed_total");
    assert_eq!(counted, claimed as u64);
    subject.daemon.api.delete_all();
    subject.daemon.stop();
    assert_eq!(
        subject.place.leftovers_of_the_daemon(),
        Vec::<String>::new()
    );
}

fn those_of_a_killed_daemon_are_gone_when_the_next_one_is_there(
    instance: &str,
    pool: u16,
    vmm: Vmm,
) {
    let subject = start(instance, pool, vmm);
    let inside = Inside::of(&subject.daemon.api.create("one", "base"));
    inside.fill(64, 128, 1);
    let hash = inside.hash();
    subject.daemon.api.pause("one").expect(200);
    wait_until_ready(&subject, 3);
    let old: Vec<i32> = waiting(&subject)
        .iter()
        .map(|process| process.pid)
        .collect();
    assert_eq!(old.len(), 3, "{old:?}");
    let subject = subject.crash(|_, _| {});
    wait_until_ready(&subject, 2);
    let new = waiting(&subject);
    assert_eq!(new.len(), 2, "{new:?}");
    assert!(
        new.iter().all(|process| !old.contains(&process.pid)),
        "{new:?}"
    );
    let dirs = support::place::names(&subject.place.run.join("ready"));
    assert_eq!(dirs.len(), 2, "{dirs:?}");
    subject.daemon.api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    subject.daemon.api.delete_all();
    subject.daemon.stop();
    assert_eq!(
        subject.place.leftovers_of_the_daemon(),
        Vec::<String>::new()
    );
}

fn none_wait_where_none_are_configured(instance: &str, pool: u16, vmm: Vmm) {
    let place = place(instance, pool, vmm);
    let with_none = [
        ("ready_slots = 0", "ready_slots = 2"),
        ("[vmm]\n", "[vmm]\nready_processes = 0\n"),
    ];
    place.reconfigure(&with_none);
    let subject = Subject::start_in(place, Kind::usual(vmm), PLAYER);
    let slots = "thaw_slots_waiting{for=\"anybody\"}";
    wait_for("slots wait", Duration::from_secs(30), || {
        (metric(&subject.daemon, slots) == 2).then_some(())
    });
    subject.daemon.api.create("one", "base");
    subject.daemon.api.pause("one").expect(200);
    subject.daemon.api.resume("one").expect(200);
    assert!(last_restore(&subject).contains("was_waiting=false"));
    assert!(waiting(&subject).is_empty());
    subject.daemon.api.delete_all();
    subject.daemon.stop();
}
