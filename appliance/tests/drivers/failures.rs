//! Whatever fails at any call leaves what was there before; and how a VMM ended is said.

use serde_json::{Value, json};

use crate::start;
use crate::support::api::Answer;
use crate::support::fake::subject::{Inside, Subject};
use crate::support::fake::{Fault, Kind, Vmm};

/// Faults that leave a VMM alive.
const ALIVE: [Fault; 3] = [Fault::Fail, Fault::Hang, Fault::Truncate];

/// Calls of a pause, and of a snapshot until the guest goes on, with each such fault.
fn stop_and_save(vmm: Vmm) -> impl Iterator<Item = (&'static str, Fault)> {
    let calls = [vmm.stop_call()]
        .into_iter()
        .chain(vmm.save_calls().iter().copied());
    calls.flat_map(|call| ALIVE.map(|fault| (call, fault)))
}

pub(super) fn a_creation_that_fails_at_any_call_leaves_nothing(
    instance: &str,
    pool: u16,
    vmm: Vmm,
) {
    let subject = start(instance, pool, Kind::usual(vmm));
    let api = &subject.daemon.api;
    for call in vmm.boot_calls() {
        for fault in Fault::ALL {
            subject.fake.fail_at(call, fault);
            let body = json!({ "id": "one", "template": "base" });
            let failed = api.post("/v1/sandboxes", &body);
            assert_eq!(failed.status, 500, "{call} {fault:?}: {}", failed.body);
            assert_eq!(failed.body["code"], "vmm_failed", "{}", failed.body);
            api.sandbox("one").expect(404);
            let left = subject.place.leftovers();
            assert_eq!(left, Vec::<String>::new(), "{call} {fault:?}");
        }
    }
    subject.fake.heal();
    api.create("one", "base");
    subject.end();
}

pub(super) fn a_resume_that_fails_at_any_call_leaves_it_paused(
    instance: &str,
    pool: u16,
    vmm: Vmm,
) {
    let subject = start(instance, pool, Kind::usual(vmm));
    let api = &subject.daemon.api;
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 128, 1);
    let hash = inside.hash();
    let build = api.pause("one").expect(200)["build"].clone();
    subject.limit_disk("one");
    for call in vmm.restore_calls() {
        for fault in Fault::ALL {
            subject.fake.fail_at(call, fault);
            let failed = api.resume("one");
            assert_eq!(failed.status, 500, "{call} {fault:?}: {}", failed.body);
            let sandbox = api.sandbox("one").expect(200);
            assert_eq!(sandbox["state"], "paused", "{call} {fault:?}: {sandbox}");
            assert_eq!(sandbox["build"], build, "{sandbox}");
            let left = subject.place.sandbox_leftovers();
            assert_eq!(left, Vec::<String>::new(), "{call} {fault:?}");
        }
    }
    subject.fake.heal();
    api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    subject.end();
}

/// What is done fails with a fault, and the sandbox `one` goes on with all that it had: memory of this
/// hash, and these builds.
fn fails_and_leaves_it_running(
    subject: &Subject,
    inside: &Inside,
    (hash, builds): (&Value, &[String]),
    (call, fault): (&str, Fault),
    act: impl FnOnce() -> Answer,
) {
    let count = inside.count();
    subject.fake.fail_at(call, fault);
    let failed = act();
    assert_eq!(failed.status, 500, "{call} {fault:?}: {}", failed.body);
    subject.fake.heal();
    let sandbox = subject.daemon.api.sandbox("one").expect(200);
    assert_eq!(sandbox["state"], "running", "{call} {fault:?}: {sandbox}");
    inside.runs_on_from(count);
    assert_eq!(inside.hash(), *hash, "{call} {fault:?}");
    assert_eq!(subject.place.leftovers(), builds, "{call} {fault:?}");
}

pub(super) fn a_pause_that_fails_at_any_call_leaves_it_running(
    instance: &str,
    pool: u16,
    vmm: Vmm,
) {
    let subject = start(instance, pool, Kind::usual(vmm));
    let api = &subject.daemon.api;
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 128, 1);
    let hash = inside.hash();
    // As booted, and as restored: they are saved in different ways.
    for restored in [false, true] {
        if restored {
            api.pause("one").expect(200);
            api.resume("one").expect(200);
        }
        let builds = subject.place.leftovers();
        for (call, fault) in stop_and_save(vmm) {
            // It takes its time, once for each call.
            if fault == Fault::Hang && !restored {
                continue;
            }
            let pause = || api.pause("one");
            fails_and_leaves_it_running(&subject, &inside, (&hash, &builds), (call, fault), pause);
        }
    }
    api.pause("one").expect(200);
    api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    subject.end();
}

pub(super) fn a_snapshot_that_fails_before_it_is_made_leaves_its_sandbox_running(
    instance: &str,
    pool: u16,
    vmm: Vmm,
) {
    let subject = start(instance, pool, Kind::usual(vmm));
    let api = &subject.daemon.api;
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 128, 1);
    let hash = inside.hash();
    for (call, fault) in stop_and_save(vmm) {
        let (builds, snapshot) = (subject.place.leftovers(), || api.snapshot("one", "warm"));
        // Neither a build nor a name that is taken.
        fails_and_leaves_it_running(&subject, &inside, (&hash, &builds), (call, fault), snapshot);
        api.get("/v1/snapshots/warm").expect(404);
    }
    api.snapshot("one", "warm").expect(201);
    assert_eq!(Inside::of(&api.create("two", "warm")).hash(), hash);
    subject.end();
}

pub(super) fn a_vmm_that_dies_in_a_pause_fails_its_sandbox_and_says_so(
    instance: &str,
    pool: u16,
    vmm: Vmm,
) {
    let subject = start(instance, pool, Kind::usual(vmm));
    let api = &subject.daemon.api;
    for call in [vmm.stop_call()].iter().chain(vmm.save_calls()) {
        api.create("one", "base");
        subject.fake.fail_at(call, Fault::Die);
        api.pause("one").expect(500);
        subject.fake.heal();
        let sandbox = api.sandbox("one").expect(200);
        assert_eq!(sandbox["state"], "failed", "{call}: {sandbox}");
        let reason = sandbox["reason"].as_str().unwrap();
        assert!(reason.contains("has ended: exit status 1"), "{reason}");
        api.destroy("one");
        assert_eq!(subject.place.leftovers(), Vec::<String>::new(), "{call}");
    }
    subject.end();
}

pub(super) fn the_ways_in_which_a_vmm_ends_are_told_apart(instance: &str, pool: u16, vmm: Vmm) {
    let subject = start(instance, pool, Kind::usual(vmm));
    let api = &subject.daemon.api;
    for (how, said) in [
        (0, "the guest switched itself off"),
        (2, "the guest restarted"),
        (1, "the guest's kernel panicked: [    1.0] Kernel panic"),
        (libc::SIGSYS, "its system call filter stopped it"),
        (libc::SIGKILL, "killed by SIGKILL"),
        (libc::SIGABRT, "signal 6"),
    ] {
        let inside = Inside::of(&api.create("one", "base"));
        let _ = inside.try_call("POST", &format!("/test/end?how={how}"));
        let reason = api.failure("one");
        assert!(reason.contains(said), "{how}: {reason}");
        assert!(reason.contains("envd listening") || how == 1, "{reason}");
        api.destroy("one");
    }
    subject.end();
}
