//! The lifecycle over every driver that has a fake: a daemon, a real engine, and a VMM that is none
//! (see `support/fake`), so that it runs everywhere; whatever can go wrong at a call of the VMM's
//! API, or in a migration, does.
//!
//! One body per behaviour; [`over_each`] makes a test of it for each VMM.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::time::Duration;

use serde_json::{Value, json};
use support::daemon::Daemon;
use support::fake::each::{needs_fakes, over_each};
use support::fake::subject::{Inside, MEMORY_MB, Subject, place, use_fakes};
use support::fake::{self, Fake, Fault, Kind, Vmm};
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

fn memory_survives_ten_cycles(instance: &str, pool: u16, vmm: Vmm) {
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
    needs_fakes!("memory_survives_ten_cycles_where_no_state_is_had_without_it");
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

fn memory_survives_ten_cycles_without_knowing_its_writes(instance: &str, pool: u16, vmm: Vmm) {
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

/// As VMMs are told them.
fn buckets(mib_per_s: Option<u64>, ops_per_s: Option<u64>) -> Value {
    let mut limits = json!({});
    for (name, size) in [
        ("bandwidth", mib_per_s.map(|mib| mib << 20)),
        ("ops", ops_per_s),
    ] {
        if let Some(size) = size {
            limits[name] = json!({ "size": size, "refill_time": 1000 });
        }
    }
    limits
}

/// No limits are none at all, or nothing said of any.
fn known_limits(inside: &Inside) -> Value {
    match inside.call("GET", "/test/disk-limits") {
        Value::Null => json!({}),
        limits => limits,
    }
}

fn a_disk_has_the_limits_that_it_is_given(instance: &str, pool: u16, vmm: Vmm) {
    let place = place(instance, pool, vmm);
    let text = fs::read_to_string(&place.config).unwrap();
    fs::write(&place.config, format!("{text}[disks]\nops_per_s = 500\n")).unwrap();
    let subject = Subject::start_in(place, Kind::usual(vmm), PLAYER);
    let api = &subject.daemon.api;
    let limits = json!({ "mib_per_s": 8 });
    let body = json!({ "id": "one", "template": "base", "disk_limits": limits });
    let made = api.post("/v1/sandboxes", &body).expect(201);
    assert_eq!(made["disk_limits"], limits);
    let inside = Inside::of(&made);
    // Its own, and the host's where it has none.
    assert_eq!(known_limits(&inside), buckets(Some(8), Some(500)));

    let path = "/v1/sandboxes/one/disk";
    let put = |limits: &Value| api.call("PUT", path, Some(limits));
    let wrong = put(&json!({ "ops_per_s": 0 }));
    assert_eq!(wrong.body["field"], "ops_per_s", "{}", wrong.body);
    wrong.expect(400);
    let limits = json!({ "ops_per_s": 70 });
    let answer = put(&limits);
    let now = if vmm == Vmm::CloudHypervisor {
        let detail = answer.detail().to_owned();
        assert!(detail.contains("pause it first"), "{detail}");
        answer.expect(409);
        assert_eq!(
            api.sandbox("one").body["disk_limits"],
            json!({ "mib_per_s": 8 })
        );
        buckets(Some(8), Some(500))
    } else {
        assert_eq!(answer.expect(200)["disk_limits"], limits);
        subject.fake.fail_at("PATCH /drives/rootfs", Fault::Fail);
        let failed = put(&json!({ "mib_per_s": 1 }));
        subject.fake.heal();
        failed.expect(500);
        assert_eq!(api.sandbox("one").body["disk_limits"], limits);
        buckets(None, Some(70))
    };
    assert_eq!(known_limits(&inside), now);
    // Kept while it is paused, and what is changed then holds as soon as it is back.
    api.pause("one").expect(200);
    api.resume("one").expect(200);
    assert_eq!(known_limits(&inside), now);
    api.pause("one").expect(200);
    put(&limits).expect(200);
    api.resume("one").expect(200);
    assert_eq!(known_limits(&inside), buckets(None, Some(70)));
    // A copy has them, too; none are what the host lets all.
    let forked = api.post("/v1/sandboxes/one/fork", &json!({ "count": 1 }));
    let forked = forked.expect(201);
    assert_eq!(forked["sandboxes"][0]["disk_limits"], limits, "{forked}");
    api.pause("one").expect(200);
    put(&json!({})).expect(200);
    api.resume("one").expect(200);
    assert_eq!(known_limits(&inside), buckets(None, Some(500)));
    subject.end();
}

fn disks_have_the_limits_of_the_configuration(instance: &str, pool: u16, vmm: Vmm) {
    let place = place(instance, pool, vmm);
    let text = fs::read_to_string(&place.config).unwrap();
    let limits = "[disks]\nmib_per_s = 8\nops_per_s = 500\n";
    fs::write(&place.config, format!("{text}{limits}")).unwrap();
    let subject = Subject::start_in(place, Kind::usual(vmm), PLAYER);
    let inside = Inside::of(&subject.daemon.api.create("one", "base"));
    let bucket = |size: u64| json!({ "size": size, "refill_time": 1000 });
    let both = json!({ "bandwidth": bucket(8 << 20), "ops": bucket(500) });
    assert_eq!(inside.call("GET", "/test/disk-limits"), both);
    subject.daemon.api.pause("one").expect(200);
    let Subject {
        place,
        fake,
        daemon,
    } = subject;
    daemon.stop();
    // Those of today, not those it was booted with.
    place.reconfigure(&[("mib_per_s = 8\nops_per_s = 500", "ops_per_s = 70")]);
    let daemon = Daemon::start(&place);
    daemon.api.resume("one").expect(200);
    let one = json!({ "ops": bucket(70) });
    assert_eq!(inside.call("GET", "/test/disk-limits"), one);
    daemon.api.pause("one").expect(200);
    daemon.stop();
    place.reconfigure(&[("ops_per_s = 70", "")]);
    let daemon = Daemon::start(&place);
    daemon.api.resume("one").expect(200);
    assert_eq!(known_limits(&inside), json!({}));
    Subject {
        place,
        fake,
        daemon,
    }
    .end();
}

fn a_guest_waits_for_an_engine_that_is_slow(instance: &str, pool: u16, vmm: Vmm) {
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

fn memory_survives_engines_that_die_between_its_writes(instance: &str, pool: u16, vmm: Vmm) {
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

fn a_creation_that_fails_at_any_call_leaves_nothing(instance: &str, pool: u16, vmm: Vmm) {
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

fn a_resume_that_fails_at_any_call_leaves_it_paused(instance: &str, pool: u16, vmm: Vmm) {
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

/// Faults that leave a VMM alive.
const ALIVE: [Fault; 3] = [Fault::Fail, Fault::Hang, Fault::Truncate];

/// Calls of a pause, and of a snapshot until the guest goes on, with each such fault.
fn stop_and_save(vmm: Vmm) -> impl Iterator<Item = (&'static str, Fault)> {
    let calls = [vmm.stop_call()]
        .into_iter()
        .chain(vmm.save_calls().iter().copied());
    calls.flat_map(|call| ALIVE.map(|fault| (call, fault)))
}

fn a_pause_that_fails_at_any_call_leaves_it_running(instance: &str, pool: u16, vmm: Vmm) {
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
            let count = inside.count();
            subject.fake.fail_at(call, fault);
            let failed = api.pause("one");
            assert_eq!(failed.status, 500, "{call} {fault:?}: {}", failed.body);
            subject.fake.heal();
            let sandbox = api.sandbox("one").expect(200);
            assert_eq!(sandbox["state"], "running", "{call} {fault:?}: {sandbox}");
            inside.runs_on_from(count);
            assert_eq!(inside.hash(), hash, "{call} {fault:?}");
            assert_eq!(subject.place.leftovers(), builds, "{call} {fault:?}");
        }
    }
    api.pause("one").expect(200);
    api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    subject.end();
}

fn a_snapshot_that_fails_before_it_is_made_leaves_its_sandbox_running(
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
        let (count, builds) = (inside.count(), subject.place.leftovers());
        subject.fake.fail_at(call, fault);
        let failed = api.snapshot("one", "warm");
        assert_eq!(failed.status, 500, "{call} {fault:?}: {}", failed.body);
        subject.fake.heal();
        let sandbox = api.sandbox("one").expect(200);
        assert_eq!(sandbox["state"], "running", "{call} {fault:?}: {sandbox}");
        inside.runs_on_from(count);
        assert_eq!(inside.hash(), hash, "{call} {fault:?}");
        // Neither a build nor a name that is taken.
        assert_eq!(subject.place.leftovers(), builds, "{call} {fault:?}");
        api.get("/v1/snapshots/warm").expect(404);
    }
    api.snapshot("one", "warm").expect(201);
    assert_eq!(Inside::of(&api.create("two", "warm")).hash(), hash);
    subject.end();
}

fn a_vmm_that_dies_in_a_pause_fails_its_sandbox_and_says_so(instance: &str, pool: u16, vmm: Vmm) {
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

fn the_ways_in_which_a_vmm_ends_are_told_apart(instance: &str, pool: u16, vmm: Vmm) {
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

#[test]
fn memory_survives_ten_cycles_in_a_cloud_hypervisor_that_asks_for_no_pages() {
    needs_fakes!("memory_survives_ten_cycles_in_a_cloud_hypervisor_that_asks_for_no_pages");
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
