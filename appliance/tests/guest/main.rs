//! A daemon and real guests, seen from outside: what HTTP says, what runs, what is on disk.

mod balloon;
mod confined;
mod damage;
mod elsewhere;
#[path = "../support/mod.rs"]
mod support;

use std::time::Duration;

use appliance::sys::device_mapper::DeviceMapper;
use serde_json::{Value, json};
use support::daemon::{Daemon, run};
use support::needs::{self, GuestInputs, TestedVmm};
use support::place::{Place, names};
use support::workload::Workload;
use support::{guest_mb, procs, skip, wait_for};

/// Takes the inputs, or prints why there are none and leaves the test.
macro_rules! inputs_or_skip {
    ($test:literal) => {
        match needs::for_guests() {
            Ok(inputs) => inputs,
            Err(reason) => return skip($test, &reason),
        }
    };
}

fn start(instance: &str, pool: u16, inputs: &GuestInputs) -> (Place, Daemon) {
    let place = Place::new(instance, pool, Some(inputs));
    let daemon = Daemon::start(&place);
    (place, daemon)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[test]
fn guest_lives_a_whole_life() {
    let inputs = inputs_or_skip!("guest_lives_a_whole_life");
    let _turn = needs::one_at_a_time();
    let place = Place::new("tlife", 1, Some(&inputs));
    confined::configure(&place);
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    let host = api.get("/v1/host").expect(200);

    let body = json!({
        "id": "one", "template": "base",
        "env": { "COLOUR": "blue" }, "labels": { "owner": "test" },
        "network": { "deny": ["192.0.2.0/24"] },
    });
    let made = api.post("/v1/sandboxes", &body).expect(201);
    assert_eq!(made["state"], "running", "{made}");
    assert_eq!(made["labels"]["owner"], "test");
    assert_eq!(made["network"]["deny"], json!(["192.0.2.0/24"]), "{made}");
    assert_eq!(
        (&made["vcpus"], &made["memory_mb"]),
        (&json!(1), &json!(guest_mb()))
    );
    assert!(made.get("build").is_none(), "{made}");
    confined::check(&place, &host, "one");

    // A name is taken, a name is unknown.
    // The same request again is answered with what it made; another one is refused.
    let again = api.post("/v1/sandboxes", &body).expect(200);
    assert_eq!(again["execution_id"], made["execution_id"], "{again}");
    let other = api.post("/v1/sandboxes", &json!({ "id": "one", "template": "base" }));
    assert_eq!(other.body["code"], "exists");
    other.expect(409);
    let unknown = json!({ "id": "two", "template": "nothing" });
    api.post("/v1/sandboxes", &unknown).expect(404);
    api.sandbox("two").expect(404);
    api.pause("two").expect(404);
    api.snapshot("two", "tpl").expect(404);
    api.exec("two", "true", &[]).expect(404);
    api.delete("/v1/sandboxes/two").expect(404);
    api.delete("/v1/snapshots/nothing").expect(404);

    commands_are_run_and_judged(&daemon);
    let mut work = Workload::start(api, "one", 16);

    // Paused: nothing runs, and the refusals say so.
    let paused = api.pause("one").expect(200);
    assert_eq!(paused["state"], "paused", "{paused}");
    assert_eq!(paused["generation"], 0, "{paused}");
    assert!(procs::vmm(&place, "one").is_none(), "a VMM runs still");
    assert_eq!(place.sandbox_leftovers(), Vec::<String>::new());
    for refused in [api.exec("one", "true", &[]), api.pause("one")] {
        assert_eq!(refused.body["state"], "paused", "{}", refused.body);
        assert!(refused.detail().contains("paused"), "{}", refused.body);
        refused.expect(409);
    }
    let memory = api.get("/v1/sandboxes/one/memory").expect(200);
    assert_eq!(memory["resident_pages"], 0, "{memory}");
    assert!(memory["diff_pages"].as_u64().unwrap() > 4096, "{memory}");

    // What it may reach is replaced running or not, and kept.
    let network = json!({ "allow_internet_access": false, "allow": ["198.51.100.0/24"] });
    let path = "/v1/sandboxes/one/network";
    let changed = api.call("PUT", path, Some(&network)).expect(200);
    assert_eq!(changed["network"], network, "{changed}");
    let unknown = "/v1/sandboxes/two/network";
    api.call("PUT", unknown, Some(&network)).expect(404);

    disk_is_limited(&daemon, "paused");
    // Back: the same address, memory and process.
    let resumed = api.resume("one").expect(200);
    assert_eq!(resumed["state"], "running", "{resumed}");
    assert_eq!(resumed["address"], made["address"]);
    assert_eq!(resumed["labels"], made["labels"]);
    assert_eq!(resumed["network"], network, "{resumed}");
    confined::check(&place, &host, "one");
    let changed = api.call("PUT", path, Some(&json!({}))).expect(200);
    assert_eq!(changed["network"], json!({ "allow_internet_access": true }));
    api.shell("one", "echo limited > /root/limited && sync");
    disk_is_limited(&daemon, "running");
    assert_eq!(api.shell("one", "cat /root/limited"), "limited");
    let refused = api.resume("one");
    assert_eq!(refused.body["state"], "running", "{}", refused.body);
    refused.expect(409);
    // What is meant for the run before is refused, and told the newest.
    let run = |run: &Value| format!("execution_id={}", run.as_str().unwrap());
    let stale = run(&made["execution_id"]);
    for (method, path) in [
        ("POST", "/v1/sandboxes/one/pause"),
        ("POST", "/v1/sandboxes/one/fork"),
        ("DELETE", "/v1/sandboxes/one"),
    ] {
        let late = api.call(method, &format!("{path}?{stale}"), None);
        assert_eq!(
            late.body["execution_id"], resumed["execution_id"],
            "{}",
            late.body
        );
        late.expect(412);
    }
    let newest = run(&resumed["execution_id"]);
    let path_of_now = format!("/v1/sandboxes/one/timeout?{newest}");
    api.post(&path_of_now, &json!({ "timeout_s": null }))
        .expect(200);
    if is_served(&daemon) {
        engines_are_in_the_metrics(&daemon);
        memory_was_faulted_in_lazily(&daemon);
    }
    work.check(api, "one");
    assert_eq!(api.shell("one", "echo $COLOUR"), "blue");

    a_lost_disk_goes(&place, &daemon);
    clones_outlive_their_template(&place, &daemon, &work, &host);

    api.destroy("one");
    api.sandbox("one").expect(404);
    assert_eq!(api.get("/v1/sandboxes").expect(200), json!([]));
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
    assert_eq!(place.leftovers_of_the_daemon(), Vec::<String>::new());
}

/// Its VMM takes limits of the disk in this state, and takes them back.
fn disk_is_limited(daemon: &Daemon, state: &str) {
    let host = daemon.api.get("/v1/host").expect(200);
    let put = |limits: &Value| {
        let path = "/v1/sandboxes/one/disk";
        daemon.api.call("PUT", path, Some(limits))
    };
    let limits = json!({ "mib_per_s": 512, "ops_per_s": 100_000 });
    let answer = put(&limits);
    if state == "running" && host["vmm"]["name"] == "cloud-hypervisor" {
        answer.expect(409);
        return;
    }
    assert_eq!(answer.expect(200)["disk_limits"], limits);
    if state == "running" {
        daemon
            .api
            .shell("one", "cp /bin/busybox /root/copy && sync && rm /root/copy");
        let none = put(&json!({})).expect(200);
        assert!(none.get("disk_limits").is_none(), "{none}");
    }
}

/// Where there is device-mapper: the device of a sandbox that there isn't goes, and no other.
fn a_lost_disk_goes(place: &Place, daemon: &Daemon) {
    let Ok(mapper) = DeviceMapper::open() else {
        return;
    };
    let name = format!("thaw-{}-lost", place.instance);
    mapper.create(&name).unwrap();
    let path = "/v1/host/reconcile";
    let answer = daemon.api.call("POST", path, None).expect(200);
    let lost = json!([{ "kind": "disk", "name": "lost", "removed": true }]);
    assert_eq!(answer["found"], lost, "{answer}");
}

fn engines_are_in_the_metrics(daemon: &Daemon) {
    let text = daemon.api.get("/metrics").expect(200);
    let value = |name: &str| {
        let lines = text.as_str().unwrap().lines();
        let mut values =
            lines.filter_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        values
            .next()
            .unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    assert!(value("thaw_faults_total") > 0.0);
    assert!(value("thaw_pages_resident") > 0.0);
    assert!(value("thaw_fault_service_seconds_count") > 0.0);
    assert!(value("thaw_engine_turn_seconds_count") > 0.0);
    assert!((value("thaw_sessions") - 1.0).abs() < 0.1);
}

fn commands_are_run_and_judged(daemon: &Daemon) {
    let api = &daemon.api;
    let console = api.get("/v1/sandboxes/one/console").expect(200);
    let lines = console.as_array().unwrap();
    assert!(!lines.is_empty(), "a boot is heard of");
    assert!(
        lines.is_sorted_by_key(|line| line["at_ms"].as_u64().unwrap()),
        "{console}"
    );
    let ran = api
        .exec("one", "sh", &["-c", "echo out; echo err >&2; exit 7"])
        .expect(200);
    assert_eq!(ran["exit_code"], 7, "{ran}");
    assert_eq!(text(&ran["stdout"]), "out\n");
    assert_eq!(text(&ran["stderr"]), "err\n");
    let unknown = api.exec("one", "no-such-program", &[]);
    assert_eq!(unknown.body["field"], "cmd", "{}", unknown.body);
    unknown.expect(400);
    let body = json!({ "cmd": "sleep", "args": ["60"], "user": "root", "timeout_ms": 300 });
    let cut = api.post("/v1/sandboxes/one/exec", &body);
    assert_ne!(cut.body["exit_code"], 0, "{}", cut.body);
    assert_eq!(api.shell("one", "hostname"), "one");
}

/// Whether engines serve guests; a VMM that can't ask them reads a file by itself, and says so.
fn is_served(daemon: &Daemon) -> bool {
    let host = daemon.api.get("/v1/host").expect(200);
    !text(&host["vmm"]["reason"]).contains("out of a file")
}

/// Whether the VMM asks for all of a guest's memory sooner or later.
fn asks_for_all() -> bool {
    matches!(needs::vmm(), TestedVmm::Other("cloud-hypervisor", _))
}

fn memory_was_faulted_in_lazily(daemon: &Daemon) {
    let memory = daemon.api.get("/v1/sandboxes/one/memory").expect(200);
    let number = |key: &str| memory[key].as_f64().unwrap();
    assert_eq!(number("guest_pages"), (guest_mb() << 8) as f64);
    assert_eq!(number("page_bytes"), 4096.0);
    assert!(number("faults") > 0.0, "{memory}");
    // Twice for a page at the most, because before Linux 6.7 its first write is a fault as well; but
    // the guest may have given some back, and asked for them again.
    assert!(
        4.0 * number("resident_pages") >= number("faults"),
        "{memory}"
    );
    // The data alone is 4096 pages that nobody has asked for since, unless the VMM asks for all.
    if !asks_for_all() {
        assert!(
            number("resident_pages") < number("diff_pages") - 4096.0,
            "{memory}"
        );
    }
    assert!(number("fault_us_p50") > 0.0, "{memory}");
    assert!(number("fault_us_p50") <= number("fault_us_p99"), "{memory}");
    assert!(number("fault_us_p99") <= number("fault_us_max"), "{memory}");
}

fn clones_outlive_their_template(place: &Place, daemon: &Daemon, work: &Workload, host: &Value) {
    let api = &daemon.api;
    let template = api.snapshot("one", "tpl").expect(201);
    assert_eq!(template["kind"], "memory", "{template}");
    assert_eq!(template["generation"], 1, "{template}");
    assert_eq!(api.sandbox("one").body["state"], "running");
    assert_eq!(api.snapshot("one", "tpl").body["code"], "exists");
    assert_eq!(api.snapshot("one", "base").body["code"], "exists");

    for (field, value) in [("memory_mb", 512), ("vcpus", 2)] {
        let mut body = json!({ "id": "clone", "template": "tpl" });
        body[field] = json!(value);
        let refused = api.post("/v1/sandboxes", &body);
        assert_eq!(refused.body["field"], field, "{}", refused.body);
        refused.expect(400);
        api.sandbox("clone").expect(404);
    }

    let clone = api.create("clone", "tpl");
    assert_ne!(clone["address"], api.sandbox("one").body["address"]);
    for id in ["one", "clone"] {
        confined::check(place, host, id);
    }
    let mut cloned = work.clone();
    cloned.check(api, "clone");
    assert_eq!(api.shell("clone", "hostname"), "clone");
    api.shell("clone", "echo mine > /root/mine && sync");
    api.shell("one", "test ! -e /root/mine");

    api.delete("/v1/snapshots/tpl").expect(204);
    api.get("/v1/snapshots/tpl").expect(404);
    api.delete("/v1/snapshots/base").expect(400);
    let body = json!({ "template": "tpl" });
    api.post("/v1/sandboxes", &body).expect(404);
    cloned.check(api, "clone");
    let paused = api.pause("clone").expect(200);
    assert_eq!(paused["generation"], 2, "{paused}");
    let resumed = api.resume("clone").expect(200);
    assert_eq!(resumed["address"], clone["address"]);
    cloned.check(api, "clone");
    assert_eq!(api.shell("clone", "cat /root/mine"), "mine");
    api.destroy("clone");
    assert!(procs::vmm(place, "clone").is_none());
    work.clone().check(api, "one");
}

#[test]
fn guest_goes_on_when_its_pause_fails() {
    let name = "guest_goes_on_when_its_pause_fails";
    let inputs = inputs_or_skip!("guest_goes_on_when_its_pause_fails");
    let _turn = needs::one_at_a_time();
    let room = 420 << 20;
    let place = match Place::with_small_disk("tfull", 3, &inputs, room) {
        Ok(place) => place,
        Err(reason) => return skip(name, &reason),
    };
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    api.create("one", "base");
    let mut work = Workload::start(api, "one", 32);

    // Room for the guest's own writes, not for its memory.
    let ballast = fill_up(&place, 16 << 20);

    for operation in ["pause", "snapshot"] {
        let refused = match operation {
            "pause" => api.pause("one"),
            _ => api.snapshot("one", "tpl"),
        };
        let detail = refused.detail().to_owned();
        assert_eq!(refused.status, 507, "{operation}: {}", refused.body);
        assert!(detail.contains("goes on running"), "{operation}: {detail}");
        assert!(detail.contains("No space left"), "{operation}: {detail}");
        let sandbox = api.sandbox("one").expect(200);
        assert_eq!(sandbox["state"], "running", "{sandbox}");
        assert!(text(&sandbox["reason"]).contains("No space left"));
        work.check(api, "one");
        assert_eq!(
            names(&place.data.join("builds")),
            Vec::<String>::new(),
            "{operation}"
        );
    }
    api.get("/v1/snapshots/tpl").expect(404);
    drop(ballast);
    api.pause("one").expect(200);

    // Not even a disk: nobody runs who could need the room.
    let ballast = fill_up(&place, 2 << 20);
    let body = json!({ "id": "two", "template": "base" });
    let full = api.post("/v1/sandboxes", &body);
    assert_eq!(full.status, 507, "{}", full.body);
    api.sandbox("two").expect(404);
    let full = api.resume("one");
    assert_eq!(full.status, 507, "{}", full.body);
    assert_eq!(api.sandbox("one").body["state"], "paused");
    assert_eq!(place.sandbox_leftovers(), Vec::<String>::new());
    drop(ballast);
    let resumed = api.resume("one").expect(200);
    assert!(resumed.get("reason").is_none(), "{resumed}");
    work.check(api, "one");
    api.destroy("one");
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}

/// Takes all room in the data directory but `left` bytes, until it is dropped.
fn fill_up(place: &Place, left: u64) -> tempfile::NamedTempFile {
    let ballast = tempfile::NamedTempFile::new_in(&place.data).unwrap();
    let free = nix::sys::statvfs::statvfs(&place.data).unwrap();
    let free = free.blocks_available() * free.fragment_size();
    let (none, bytes) = (nix::fcntl::FallocateFlags::empty(), free - left);
    nix::fcntl::fallocate(ballast.as_file(), none, 0, bytes as i64).unwrap();
    ballast
}

#[test]
fn guest_is_paused_when_the_daemon_stops_and_comes_back_after_it() {
    let inputs = inputs_or_skip!("guest_is_paused_when_the_daemon_stops_and_comes_back_after_it");
    let _turn = needs::one_at_a_time();
    let (place, daemon) = start("tstop", 4, &inputs);
    let api = daemon.api.clone();
    let made = api.create("one", "base");
    let mut work = Workload::start(&api, "one", 16);

    // A second daemon of the same configuration harms neither guest nor engine.
    let engine = procs::engine(&place).unwrap().pid;
    let second = run(&["serve", "--config", place.config.to_str().unwrap()]);
    assert!(!second.status.success(), "{second:?}");
    assert_eq!(procs::engine(&place).unwrap().pid, engine);
    work.check(&api, "one");

    // Whatever is under way when the signal comes is finished, and the result is paused.
    let busy = api.clone();
    let snapshot = std::thread::spawn(move || {
        busy.try_call(
            "POST",
            "/v1/snapshots",
            Some(&json!({ "sandbox": "one", "name": "tpl" })),
        )
    });
    wait_for("it is snapshotting", Duration::from_secs(20), || {
        (api.sandbox("one").body["state"] == "snapshotting").then_some(())
    });
    daemon.stop();
    snapshot.join().unwrap().unwrap().expect(201);
    assert_eq!(place.sandbox_leftovers(), Vec::<String>::new());
    assert_eq!(place.leftovers_of_the_daemon(), Vec::<String>::new());

    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    let sandbox = api.sandbox("one").expect(200);
    assert_eq!(sandbox["state"], "paused", "{sandbox}");
    assert_eq!(sandbox["vcpus"], made["vcpus"]);
    assert_eq!(sandbox["template"], made["template"]);
    let resumed = api.resume("one").expect(200);
    assert_eq!(resumed["address"], made["address"]);
    work.check(api, "one");
    api.create("two", "tpl");
    assert_eq!(
        api.shell("two", "sha256sum < /run/fill"),
        work.memory(),
        "the template survived as well"
    );

    // Two at once, and one that is paused already.
    api.pause("two").expect(200);
    daemon.stop();
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    for id in ["one", "two"] {
        assert_eq!(api.sandbox(id).body["state"], "paused");
        api.resume(id).expect(200);
        let hash = api.shell(id, "sha256sum < /run/fill");
        assert_eq!(hash, work.memory(), "{id}");
    }
    api.delete_all();
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}

#[test]
fn guest_host_is_drained_and_says_what_happened_across_restarts() {
    let test = "guest_host_is_drained_and_says_what_happened_across_restarts";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(test, &reason),
    };
    let _turn = needs::one_at_a_time();
    let (place, daemon) = start("tdrain", 45, &inputs);
    let api = &daemon.api;
    let states = |events: &[Value]| {
        let said = events.iter().map(|event| match event["kind"].as_str() {
            Some("state") => text(&event["state"]),
            _ => text(&event["kind"]),
        });
        said.collect::<Vec<_>>()
    };

    let first = api.create("one", "base");
    let created = api.events(0, 2);
    assert_eq!(states(&created), ["creating", "running"], "{created:?}");
    assert_eq!(created[1]["sandbox"], "one");
    assert_eq!(created[1]["execution_id"], first["execution_id"]);
    let host = api.get("/v1/host").expect(200);
    assert_eq!(host["status"], "ready");
    let numbers = text(&api.get("/metrics").expect(200));
    let created = "thaw_operation_seconds_count{operation=\"create\",outcome=\"ok\"} 1\n";
    assert!(numbers.contains(created), "{numbers}");
    assert!(
        numbers.contains("thaw_sandboxes{state=\"running\"} 1\n"),
        "{numbers}"
    );
    assert_eq!(host["states"], json!({ "running": 1 }));
    assert_eq!(
        host["capacity"]["memory_allocated_mb"],
        guest_mb(),
        "{host}"
    );
    assert!(host["cpu"]["threads"].as_u64().unwrap() > 0, "{host}");

    // Drained: everything is on disk, nothing new is taken, and it can be undone.
    let drained = api.post("/v1/host/drain", &json!({})).expect(200);
    assert_eq!(drained, json!({ "paused": ["one"], "left": [] }));
    assert_eq!(api.get("/v1/host").expect(200)["status"], "draining");
    api.get("/readyz").expect(503);
    api.resume("one").expect(503);
    api.post("/v1/sandboxes", &json!({ "template": "base" }))
        .expect(503);
    api.delete("/v1/host/drain").expect(204);
    let resumed = api.resume("one").expect(200);
    assert_ne!(
        resumed["execution_id"], first["execution_id"],
        "another run"
    );
    let numbers = text(&api.get("/metrics").expect(200));
    for until in ["checked", "claimed", "running", "answered"] {
        let counted = format!("thaw_restore_seconds_count{{until=\"{until}\"");
        assert!(numbers.contains(&counted), "{until}: {numbers}");
    }

    // Stopped and started again: who was away is told what he missed.
    let last = api.events(2, 4);
    assert_eq!(states(&last), ["pausing", "paused", "resuming", "running"]);
    let last = last[3]["id"].as_u64().unwrap();
    daemon.stop();
    let daemon = Daemon::start(&place);
    daemon.api.destroy("one");
    let missed = daemon.api.events(last, 4);
    assert_eq!(
        states(&missed),
        ["pausing", "paused", "destroying", "deleted"]
    );
    assert_eq!(missed[3]["reason"], "It was asked for", "{missed:?}");
    let ids: Vec<u64> = missed
        .iter()
        .map(|event| event["id"].as_u64().unwrap())
        .collect();
    assert_eq!(ids, (last + 1..=last + 4).collect::<Vec<_>>());
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}
