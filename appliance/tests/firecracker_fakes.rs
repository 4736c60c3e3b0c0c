//! What only Firecracker's guests have, and what its calls mean when they fail one after the other,
//! on a fake of it.

mod support;

use support::fake::subject::{Inside, Subject, place};
use support::fake::{self, Fault, Kind, Vmm};
use support::{needs, skip};

/// The test that a fake's process runs as.
const PLAYER: &str = "fakes_of_firecracker_are_played_here";

/// Faults that leave a VMM alive.
const ALIVE: [Fault; 3] = [Fault::Fail, Fault::Hang, Fault::Truncate];

#[test]
fn fakes_of_firecracker_are_played_here() {
    fake::run_if_wanted();
}

#[test]
fn every_guest_has_a_vsock_of_its_own_and_clones_do() {
    if let Err(reason) = needs::for_fakes() {
        return skip("every_guest_has_a_vsock_of_its_own_and_clones_do", &reason);
    }
    let place = place("tfvsoc", 168, Vmm::Firecracker);
    let firecracker = "driver = \"firecracker\"";
    place.reconfigure(&[(firecracker, &format!("{firecracker}\nvsock = true"))]);
    let subject = Subject::start_in(place, Kind::usual(Vmm::Firecracker), PLAYER);
    let api = &subject.daemon.api;
    let connects = |id: &str| {
        let socket = subject
            .place
            .run
            .join("sandboxes")
            .join(id)
            .join("vmm/vsock.sock");
        std::os::unix::net::UnixStream::connect(&socket).map(drop)
    };
    api.create("one", "base");
    connects("one").unwrap();
    api.pause("one").expect(200);
    connects("one").unwrap_err();
    api.resume("one").expect(200);
    connects("one").unwrap();
    api.snapshot("one", "warm").expect(201);
    for id in ["two", "three"] {
        api.create(id, "warm");
        connects(id).unwrap();
    }
    api.destroy("two");
    connects("one").unwrap();
    connects("three").unwrap();
    subject.end();
}

#[test]
fn an_old_one_is_sent_what_it_knows_and_says_what_it_lacks() {
    if let Err(reason) = needs::for_fakes() {
        return skip(
            "an_old_one_is_sent_what_it_knows_and_says_what_it_lacks",
            &reason,
        );
    }
    let old = Kind {
        version: "1.13.2",
        state_format: "8.0.0",
        ..Kind::FIRECRACKER
    };
    let subject = Subject::start("tfold", 180, old, PLAYER);
    let api = &subject.daemon.api;
    let host = api.get("/v1/host").expect(200);
    let reason = host["vmm"]["reason"].as_str().unwrap();
    assert!(reason.contains("older than 1.14"), "{reason}");
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 128, 1);
    let hash = inside.hash();
    api.pause("one").expect(200);
    api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    subject.end();
}

#[test]
fn a_guest_that_does_not_go_on_after_its_snapshot_fails_and_the_snapshot_counts() {
    if let Err(reason) = needs::for_fakes() {
        return skip(
            "a_guest_that_does_not_go_on_after_its_snapshot_fails_and_the_snapshot_counts",
            &reason,
        );
    }
    let subject = Subject::start("tfgoon", 165, Kind::usual(Vmm::Firecracker), PLAYER);
    let api = &subject.daemon.api;
    for fault in ALIVE {
        let inside = Inside::of(&api.create("one", "base"));
        inside.fill(64, 128, 1);
        let hash = inside.hash();
        subject.fake.fail_at("PATCH /vm Resumed", fault);
        let failed = api.snapshot("one", "warm");
        assert_eq!(failed.status, 500, "{fault:?}: {}", failed.body);
        assert!(failed.detail().contains("has failed"), "{}", failed.body);
        subject.fake.heal();
        let sandbox = api.sandbox("one").expect(200);
        assert_eq!(sandbox["state"], "failed", "{fault:?}: {sandbox}");
        let reason = sandbox["reason"].as_str().unwrap();
        assert!(reason.contains("could not go on"), "{reason}");
        api.destroy("one");
        // It was made before, and is whole.
        let two = Inside::of(&api.create("two", "warm"));
        assert_eq!(two.hash(), hash, "{fault:?}");
        api.delete_all();
    }
    subject.end();
}

#[test]
fn a_guest_that_neither_is_saved_nor_goes_on_fails_and_its_last_build_stays() {
    if let Err(reason) = needs::for_fakes() {
        return skip(
            "a_guest_that_neither_is_saved_nor_goes_on_fails_and_its_last_build_stays",
            &reason,
        );
    }
    let subject = Subject::start("tflast", 166, Kind::usual(Vmm::Firecracker), PLAYER);
    let api = &subject.daemon.api;
    for (save, fault) in [
        (Fault::Fail, Fault::Fail),
        (Fault::Hang, Fault::Fail),
        (Fault::Truncate, Fault::Hang),
    ] {
        api.create("one", "base");
        let build = api.pause("one").expect(200)["build"].clone();
        api.resume("one").expect(200);
        subject
            .fake
            .fail_at_all(&[("PUT /snapshot/create", save), ("PATCH /vm Resumed", fault)]);
        api.pause("one").expect(500);
        subject.fake.heal();
        let sandbox = api.sandbox("one").expect(200);
        assert_eq!(sandbox["state"], "failed", "{save:?} {fault:?}: {sandbox}");
        assert_eq!(sandbox["build"], build, "{sandbox}");
        let reason = sandbox["reason"].as_str().unwrap();
        assert!(reason.contains("/snapshot/create"), "{reason}");
        assert!(reason.contains("could not go on"), "{reason}");
        assert!(subject.place.build(build.as_str().unwrap()).is_dir());
        api.destroy("one");
        assert_eq!(subject.place.leftovers(), Vec::<String>::new());
    }
    subject.end();
}
