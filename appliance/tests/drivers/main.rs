//! The lifecycle over every driver that has a fake: a daemon, a real engine, and a VMM that is none
//! (see `support/fake`), so that it runs everywhere; whatever can go wrong at a call of the VMM's
//! API, or in a migration, does.
//!
//! One body per behaviour; [`over_each`] makes a test of it for each VMM.

mod disk_limits;
mod failures;
mod memory;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::time::Duration;

use disk_limits::{
    a_disk_has_the_limits_that_it_is_given, disks_have_the_limits_of_the_configuration,
};
use failures::{
    a_creation_that_fails_at_any_call_leaves_nothing,
    a_pause_that_fails_at_any_call_leaves_it_running,
    a_resume_that_fails_at_any_call_leaves_it_paused,
    a_snapshot_that_fails_before_it_is_made_leaves_its_sandbox_running,
    a_vmm_that_dies_in_a_pause_fails_its_sandbox_and_says_so,
    the_ways_in_which_a_vmm_ends_are_told_apart,
};
use memory::{
    a_guest_waits_for_an_engine_that_is_slow, memory_survives_engines_that_die_between_its_writes,
    memory_survives_ten_cycles, memory_survives_ten_cycles_without_knowing_its_writes,
};
use serde_json::{Value, json};
use support::daemon::Daemon;
use support::fake::each::{needs_fakes, over_each};
use support::fake::subject::{Inside, MEMORY_MB, Subject, place, use_fakes};
use support::fake::{self, Fake, Kind, Vmm};
use support::{procs, wait_for};

/// The test that a fake's process runs as.
const PLAYER: &str = "a_fake_refuses_what_firecracker_refuses";
const PAGES: u64 = MEMORY_MB << 8;

over_each! {
    a_sandbox_lives_a_whole_life("life", 151);
    memory_survives_ten_cycles("cyca", 152);
    memory_survives_ten_cycles_without_knowing_its_writes("cycc", 154);
    a_snapshot_leaves_its_sandbox_running_and_clones_are_their_own("clon", 155);
    a_creation_that_fails_at_any_call_leaves_nothing("boot", 156);
    a_resume_that_fails_at_any_call_leaves_it_paused("load", 157);
    a_pause_that_fails_at_any_call_leaves_it_running("save", 158);
    a_snapshot_that_fails_before_it_is_made_leaves_its_sandbox_running("snap", 164);
    a_vmm_that_dies_in_a_pause_fails_its_sandbox_and_says_so("die", 159);
    the_ways_in_which_a_vmm_ends_are_told_apart("exit", 160);
    a_build_needs_a_vmm_that_reads_its_state("vers", 161);
    a_guest_waits_for_an_engine_that_is_slow("slow", 162);
    memory_survives_engines_that_die_between_its_writes("engi", 163);
    disks_have_the_limits_of_the_configuration("dlim", 167);
    a_disk_has_the_limits_that_it_is_given("down", 169);
}

fn start(instance: &str, pool: u16, kind: Kind) -> Subject {
    Subject::start(instance, pool, kind, PLAYER)
}

#[test]
fn a_fake_refuses_what_firecracker_refuses() {
    fake::run_if_wanted();
    needs_fakes!("a_fake_refuses_what_firecracker_refuses");
    let place = place("tfake", 150, Vmm::Firecracker);
    let fake = Fake::new(&place, PLAYER, Kind::FIRECRACKER);
    let socket = place.root.join("api.sock");
    let mut process = std::process::Command::new(&fake.program)
        .arg("--api-sock")
        .arg(&socket)
        .spawn()
        .unwrap();
    let call = |method: &str, path: &str, body: &Value| {
        let api = support::api::Api::at(&socket);
        let answer = wait_for("the fake answers", Duration::from_secs(20), || {
            let mut stream = std::os::unix::net::UnixStream::connect(&socket).ok()?;
            let body = body.to_string();
            write!(
                stream,
                "{method} {path} HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
            .ok()?;
            stream.shutdown(std::net::Shutdown::Write).ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            Some(text)
        });
        drop(api);
        answer
    };
    let size = json!({ "vcpu_count": 1, "mem_size_mib": 16 });
    assert!(call("PUT", "/machine-config", &size).starts_with("HTTP/1.1 204"));
    let unknown = json!({ "vcpu_count": 1, "mem_size_mib": 16, "colour": "blue" });
    assert!(call("PUT", "/machine-config", &unknown).contains("unknown field `colour`"));
    assert!(call("PUT", "/boot-source", &json!({})).contains("missing field"));
    let start = json!({ "action_type": "InstanceStart" });
    assert!(call("PUT", "/actions", &start).contains("without kernel"));
    let load = json!({ "snapshot_path": "/nonexistent", "mem_backend": {} });
    assert!(call("PUT", "/snapshot/load", &load).contains("not allowed after configuring"));
    assert!(call("PATCH", "/vm", &json!({ "state": "Paused" })).contains("before starting"));
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn a_vmm_is_the_daemons_user_where_that_is_configured() {
    needs_fakes!("a_vmm_is_the_daemons_user_where_that_is_configured");
    let place = place("tcown", 221, Vmm::CloudHypervisor);
    let subject = Subject::start_in(place, Kind::CLOUD_HYPERVISOR, PLAYER);
    let api = &subject.daemon.api;
    let host = api.get("/v1/host").expect(200);
    let reason = host["vmm"]["reason"].as_str().unwrap();
    let said = "as the daemon's user (vmm.own_users is false)";
    assert!(reason.contains(said), "{reason}");
    let inside = Inside::of(&api.create("one", "base"));
    let vmm = procs::vmm(&subject.place, "one").expect("a VMM");
    assert_eq!(vmm.status("Uid:"), ["0"; 4]);
    // What it was saved by doesn't matter.
    inside.fill(64, 128, 1);
    let hash = inside.hash();
    api.pause("one").expect(200);
    api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    subject.end();
}

fn a_sandbox_lives_a_whole_life(instance: &str, pool: u16, vmm: Vmm) {
    let subject = start(instance, pool, Kind::usual(vmm));
    let api = &subject.daemon.api;
    let host = api.get("/v1/host").expect(200);
    let kind = Kind::usual(vmm);
    assert_eq!(host["vmm"]["name"], vmm.name(), "{host}");
    assert_eq!(host["vmm"]["version"], kind.version, "{host}");

    let made = api.create("one", "base");
    let inside = Inside::of(&made);
    inside.fill(100, 300, 7);
    inside.call("POST", "/test/disk?word=4711");
    let known = vmm.known_of("one", "base");
    assert_eq!(inside.call("GET", "/test/metadata"), known);
    let (hash, count) = (inside.hash(), inside.count());

    let paused = api.pause("one").expect(200);
    assert_eq!(
        (&paused["state"], &paused["generation"]),
        (&json!("paused"), &json!(0))
    );
    assert!(
        procs::vmm(&subject.place, "one").is_none(),
        "a VMM runs still"
    );
    assert_eq!(subject.place.sandbox_leftovers(), Vec::<String>::new());
    let build = subject.place.build(paused["build"].as_str().unwrap());
    let manifest = fs::read(build.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    for (member, value) in [
        ("name", vmm.name()),
        ("version", kind.version),
        ("state_format", kind.state_format),
    ] {
        assert_eq!(manifest["vmm"][member], value, "{manifest}");
    }
    let flags = manifest["vmm"]["cpu_flags"].as_str().unwrap();
    assert!(flags.split(' ').any(|flag| flag == "fpu"), "{manifest}");
    // What it wrote, and little more: most of it was never touched.
    let stored = api.get("/v1/sandboxes/one/memory").expect(200)["diff_pages"].clone();
    let stored = stored.as_u64().unwrap();
    assert!((300..400).contains(&stored), "{stored}");

    let resumed = api.resume("one").expect(200);
    assert_eq!(resumed["address"], made["address"]);
    inside.runs_on_from(count);
    let memory = api.get("/v1/sandboxes/one/memory").expect(200);
    // The one is given what it touches, the other asks for everything in the end.
    let resident = memory["resident_pages"].as_u64().unwrap();
    match vmm {
        Vmm::Firecracker => assert!(resident < PAGES / 4, "{memory}"),
        Vmm::CloudHypervisor => subject.has_all_of("one"),
    }
    assert_eq!(inside.hash(), hash);
    assert_eq!(inside.call("GET", "/test/disk"), 4711);
    assert_eq!(inside.call("GET", "/test/metadata"), known);
    subject.end();
}

fn a_snapshot_leaves_its_sandbox_running_and_clones_are_their_own(
    instance: &str,
    pool: u16,
    vmm: Vmm,
) {
    let subject = start(instance, pool, Kind::usual(vmm));
    let api = &subject.daemon.api;
    let one = Inside::of(&api.create("one", "base"));
    one.fill(64, 128, 1);
    one.call("POST", "/test/disk?word=1");
    let (hash, count) = (one.hash(), one.count());
    api.snapshot("one", "warm").expect(201);
    one.runs_on_from(count);
    one.fill(64, 128, 2);
    one.call("POST", "/test/disk?word=2");

    let clones: Vec<Inside> = ["two", "three"]
        .map(|id| Inside::of(&api.create(id, "warm")))
        .into();
    for (clone, id) in clones.iter().zip(["two", "three"]) {
        assert_eq!(clone.hash(), hash);
        assert_eq!(clone.call("GET", "/test/disk"), 1);
        clone.runs_on_from(count);
        let known = vmm.known_of(id, "warm");
        assert_eq!(clone.call("GET", "/test/metadata"), known);
    }
    clones[0].fill(64, 128, 3);
    clones[0].call("POST", "/test/disk?word=3");
    assert_eq!(clones[1].hash(), hash);
    assert_eq!(clones[1].call("GET", "/test/disk"), 1);
    assert_eq!(one.call("GET", "/test/disk"), 2);
    // One that was restored is snapshotted while it runs, too.
    let changed = clones[0].hash();
    api.snapshot("two", "warmer").expect(201);
    assert_eq!(clones[0].hash(), changed);
    let four = Inside::of(&api.create("four", "warmer"));
    assert_eq!(four.hash(), changed);
    subject.end();
}

fn a_build_needs_a_vmm_that_reads_its_state(instance: &str, pool: u16, vmm: Vmm) {
    let Subject {
        place,
        fake,
        daemon,
    } = start(instance, pool, Kind::usual(vmm));
    let inside = Inside::of(&daemon.api.create("one", "base"));
    inside.fill(64, 128, 1);
    let hash = inside.hash();
    daemon.api.pause("one").expect(200);
    daemon.stop();

    // A newer one alone.
    let usual = Kind::usual(vmm);
    let (version, state_format) = match vmm {
        Vmm::Firecracker => ("1.18.0", "11.0.0"),
        Vmm::CloudHypervisor => ("55.0.0", "1-55.0.0"),
    };
    let newer = Kind {
        version,
        state_format,
        ..usual
    };
    let newer = Fake::new(&place, PLAYER, newer);
    use_fakes(&place, &[&newer], vmm);
    let daemon = Daemon::start(&place);
    let refused = daemon.api.resume("one");
    assert_eq!(
        refused.body["code"], "incompatible_host",
        "{}",
        refused.body
    );
    let parts = [usual.version, usual.state_format, version, state_format];
    for part in parts.into_iter().chain(["stays paused"]) {
        assert!(refused.detail().contains(part), "{}", refused.body);
    }
    refused.expect(409);
    daemon.stop();

    // Both, side by side.
    use_fakes(&place, &[&newer, &fake], vmm);
    let daemon = Daemon::start(&place);
    daemon.api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    let command = procs::vmm(&place, "one").unwrap();
    drop(command);
    let two = Inside::of(&daemon.api.create("two", "base"));
    two.runs_on_from(0);
    // A build goes on being what made it.
    let paused = daemon.api.pause("one").expect(200);
    let build = place.build(paused["build"].as_str().unwrap());
    let manifest = fs::read_to_string(build.join("manifest.json")).unwrap();
    let version = format!("\"{}\"", usual.version);
    assert!(manifest.contains(&version), "{manifest}");
    let subject = Subject {
        place,
        fake,
        daemon,
    };
    subject.end();
}
