//! A daemon that dies, and the next one, over every driver that has a fake: what ran runs on and is
//! the next daemon's, whatever was under way with it; what can't be taken over is reported.

mod support;

use std::fs;
use std::net::TcpListener;
use std::time::Duration;

use serde_json::json;
use support::api::Api;
use support::daemon::Daemon;
use support::fake::each::over_each;
use support::fake::subject::{Inside, Subject};
use support::fake::{self, Fault, Kind, Vmm};
use support::place::Place;
use support::procs::{self, Process};
use support::wait_for;

/// The test that a fake's process runs as.
const PLAYER: &str = "a_fake_plays";
const PATIENCE: Duration = Duration::from_secs(30);

over_each! {
    a_guest_outlives_its_daemon_and_is_the_next_ones("outl", 300);
    a_guest_is_taken_over_wherever_its_pause_was("topa", 301);
    what_cannot_be_taken_over_is_reported_and_leaves_nothing("torp", 302);
    a_policy_and_a_limit_that_were_set_before_stay("topo", 303);
    a_start_that_fails_leaves_what_runs_to_the_next_one("toby", 304);
}

#[test]
fn a_fake_plays() {
    fake::run_if_wanted();
}

fn start(instance: &str, pool: u16, vmm: Vmm) -> Subject {
    Subject::start(instance, pool, Kind::usual(vmm), PLAYER)
}

fn vmm_of(place: &Place, id: &str) -> Process {
    procs::vmm(place, id).unwrap_or_else(|| panic!("no VMM of {id}"))
}

/// Waits until a sandbox is, or is not, the daemon's: from the start on it is said to run.
fn state_of(api: &Api, id: &str) -> String {
    // Its owner answers when it has it.
    api.get(&format!("/v1/sandboxes/{id}/console")).expect(200);
    let sandbox = api.sandbox(id).expect(200);
    sandbox["state"].as_str().unwrap().to_owned()
}

fn a_guest_outlives_its_daemon_and_is_the_next_ones(instance: &str, pool: u16, vmm: Vmm) {
    let mut subject = start(instance, pool, vmm);
    let api = subject.daemon.api.clone();
    // One that was booted, one that was restored, and one that is on disk.
    let booted = api.create("booted", "base");
    let restored = api.create("restored", "base");
    api.create("sleeps", "base");
    let insides = [&booted, &restored].map(Inside::of);
    for (number, inside) in (1..).zip(&insides) {
        inside.fill(64, 256, number);
        inside.fill(3000, 3, 0);
    }
    insides[1].fill(300, 64, 9);
    let hashes = insides.each_ref().map(Inside::hash);
    api.pause("sleeps").expect(200);
    api.pause("restored").expect(200);
    // From here on its memory comes as it is touched: much of it after the last daemon is there.
    let restored = api.resume("restored").expect(200);
    let pids = ["booted", "restored"].map(|id| vmm_of(&subject.place, id).pid);
    for round in 0..3 {
        let counts = insides.each_ref().map(Inside::count);
        subject = subject.crash(|place, _| {
            // Nobody is there, and they run, and their memory is served.
            for (inside, count) in insides.iter().zip(counts) {
                inside.runs_on_from(count);
                inside.fill(3000 + round, 1, round + 1);
                inside.fill(3000 + round, 1, 0);
            }
            assert!(procs::engine(place).is_some());
        });
        let api = &subject.daemon.api;
        for (id, pid) in ["booted", "restored"].into_iter().zip(pids) {
            assert_eq!(state_of(api, id), "running", "{id}, round {round}");
            assert_eq!(vmm_of(&subject.place, id).pid, pid, "{id}, round {round}");
        }
        let now = api.sandbox("restored").expect(200);
        for field in ["execution_id", "address", "started_at_ms"] {
            assert_eq!(now[field], restored[field], "{field}");
        }
        assert_eq!(state_of(api, "sleeps"), "paused");
        assert!(procs::vmm(&subject.place, "sleeps").is_none());
        for (inside, count) in insides.iter().zip(counts) {
            inside.runs_on_from(count);
        }
    }
    assert_eq!(insides.each_ref().map(Inside::hash), hashes);

    // All that can be done to one can be done to one that was taken over.
    let api = &subject.daemon.api;
    api.snapshot("booted", "copy").expect(201);
    assert_eq!(Inside::of(&api.create("clone", "copy")).hash(), hashes[0]);
    for (id, (inside, hash)) in ["booted", "restored"]
        .into_iter()
        .zip(insides.iter().zip(hashes))
    {
        for _ in 0..2 {
            api.pause(id).expect(200);
            api.resume(id).expect(200);
            assert_eq!(inside.hash(), hash, "{id}");
        }
    }
    subject.end();
}

fn a_guest_is_taken_over_wherever_its_pause_was(instance: &str, pool: u16, vmm: Vmm) {
    let mut subject = start(instance, pool, vmm);
    let inside = Inside::of(&subject.daemon.api.create("one", "base"));
    inside.fill(64, 128, 1);
    let hash = inside.hash();
    for restored in [false, true] {
        if restored {
            subject.daemon.api.pause("one").expect(200);
            subject.daemon.api.resume("one").expect(200);
        }
        let builds = subject.place.leftovers();
        for call in [vmm.stop_call()].iter().chain(vmm.save_calls()) {
            let count = inside.count();
            subject.fake.fail_at(call, Fault::Hang);
            let api = subject.daemon.api.clone();
            let pausing = std::thread::spawn(move || {
                api.try_call("POST", "/v1/sandboxes/one/pause", Some(&json!({})))
            });
            wait_for("the VMM hangs", PATIENCE, || {
                subject.fake.hangs_at(call).then_some(())
            });
            subject = subject.crash(|_, fake| fake.heal());
            assert!(pausing.join().unwrap().is_err(), "{call}: it was answered");
            assert_eq!(state_of(&subject.daemon.api, "one"), "running", "{call}");
            inside.runs_on_from(count);
            assert_eq!(inside.hash(), hash, "{call}");
            assert_eq!(subject.place.leftovers(), builds, "{call}");
        }
    }
    let api = &subject.daemon.api;
    api.pause("one").expect(200);
    api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    subject.end();
}

fn what_cannot_be_taken_over_is_reported_and_leaves_nothing(instance: &str, pool: u16, vmm: Vmm) {
    let mut subject = start(instance, pool, vmm);
    let reason = |subject: &Subject, id: &str| {
        assert_eq!(state_of(&subject.daemon.api, id), "failed", "{id}");
        let sandbox = subject.daemon.api.sandbox(id).expect(200);
        sandbox["reason"].as_str().unwrap().to_owned()
    };
    // Its VMM has died, too.
    subject.daemon.api.create("one", "base");
    subject = subject.crash(|place, _| vmm_of(place, "one").kill());
    let said = reason(&subject, "one");
    assert!(said.contains("and so did its VMM"), "{said}");
    subject.daemon.api.destroy("one");

    // Nobody has its memory any more, nor what became of its pages; another's that was booted needs
    // nobody.
    subject.daemon.api.create("one", "base");
    subject.daemon.api.create("two", "base");
    subject.daemon.api.pause("one").expect(200);
    subject.daemon.api.resume("one").expect(200);
    subject = subject.crash(|place, _| {
        procs::engine(place).expect("an engine").kill();
        fs::remove_file(place.run.join("sandboxes/one/pages")).unwrap();
    });
    let said = reason(&subject, "one");
    // A Cloud Hypervisor may have ended by itself when nobody answered it.
    let no_vmm = vmm == Vmm::CloudHypervisor && said.contains("its VMM");
    assert!(
        no_vmm || said.contains("no engine has its memory"),
        "{said}"
    );
    assert_eq!(state_of(&subject.daemon.api, "two"), "running");
    subject.daemon.api.destroy("one");

    // It dies later, as nobody's child.
    vmm_of(&subject.place, "two").kill();
    wait_for("its end is noticed", PATIENCE, || {
        let sandbox = subject.daemon.api.sandbox("two").expect(200);
        (sandbox["state"] == "failed").then_some(())
    });
    let said = reason(&subject, "two");
    assert!(said.contains("Its VMM ended"), "{said}");
    subject.daemon.api.destroy("two");
    assert_eq!(subject.place.leftovers(), Vec::<String>::new());
    subject.end();
}

fn a_policy_and_a_limit_that_were_set_before_stay(instance: &str, pool: u16, vmm: Vmm) {
    let subject = start(instance, pool, vmm);
    let api = &subject.daemon.api;
    let inside = Inside::of(&api.create("one", "base"));
    let policy = json!({ "allow_internet_access": false, "ingress_kbit_s": 4000 });
    let set = api.call("PUT", "/v1/sandboxes/one/network", Some(&policy));
    let set = set.expect(200);
    let subject = subject.crash(|_, _| {});
    let api = &subject.daemon.api;
    assert_eq!(state_of(api, "one"), "running");
    assert_eq!(api.sandbox("one").expect(200)["network"], set["network"]);
    inside.runs_on_from(0);
    // Its slot is nobody else's.
    let two = api.create("two", "base");
    assert_ne!(two["address"], set["address"]);
    let disk = api.get("/v1/sandboxes/one/disk").expect(200);
    assert!(disk["size_bytes"].as_u64().unwrap() > 0, "{disk}");
    subject.end();
}

fn a_start_that_fails_leaves_what_runs_to_the_next_one(instance: &str, pool: u16, vmm: Vmm) {
    let subject = start(instance, pool, vmm);
    let api = &subject.daemon.api;
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 256, 1);
    api.pause("one").expect(200);
    api.resume("one").expect(200);
    let (count, pid) = (inside.count(), vmm_of(&subject.place, "one").pid);
    let subject = subject.crash(|place, _| {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let (none, one) = ("listen = []", format!("listen = [\"{address}\"]"));
        place.reconfigure(&[(none, &one)]);
        for _ in 0..2 {
            assert!(Daemon::try_start(place).is_err(), "the port is taken");
            inside.runs_on_from(count);
            // Of memory that was not there yet, too.
            inside.fill(5000, 8, 3);
        }
        place.reconfigure(&[(&one, none)]);
    });
    assert_eq!(state_of(&subject.daemon.api, "one"), "running");
    assert_eq!(vmm_of(&subject.place, "one").pid, pid);
    let hash = inside.hash();
    subject.daemon.api.pause("one").expect(200);
    subject.daemon.api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    subject.end();
}
