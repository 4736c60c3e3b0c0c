//! What engines do besides answering faults, with real guests: working sets, loading all memory,
//! and pauses that read what was written.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::api::Api;
use support::daemon::{Daemon, run};
use support::needs;
use support::place::Place;
use support::workload::Workload;
use support::{skip, wait_for};

/// For things that take a fraction of a second on an idle host.
const PATIENCE: Duration = Duration::from_secs(60);

fn memory(api: &Api, id: &str, key: &str) -> u64 {
    let stats = api.get(&format!("/v1/sandboxes/{id}/memory")).expect(200);
    stats[key].as_u64().unwrap_or_else(|| panic!("{stats}"))
}

/// The label of a build that says how its pages were told from its parent's.
fn capture(place: &Place, build: &Value) -> Value {
    let manifest = place.build(build.as_str().unwrap()).join("manifest.json");
    let manifest: Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
    manifest["labels"]["capture"].clone()
}

/// The pages of a build that are not zero, whoever stores them.
fn stored_pages(place: &Place, build: &Value) -> u64 {
    let dir = place.build(build.as_str().unwrap());
    let output = run(&["snapshot", "inspect", dir.to_str().unwrap(), "--json"]);
    assert!(output.status.success(), "{output:?}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let pages = |key: &str| found[key].as_u64().unwrap();
    pages("own_pages") + pages("inherited_pages")
}

#[test]
fn guest_replays_what_its_earlier_resume_touched() {
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip("guest_replays_what_its_earlier_resume_touched", &reason),
    };
    let _turn = needs::one_at_a_time();
    let place = Place::new("tset", 5, Some(&inputs));
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    api.create("one", "base");
    let mut work = Workload::start(api, "one", 8);
    let first = api.pause("one").expect(200);
    assert_eq!(capture(&place, &first["build"]), "comparison");

    // Nobody has touched anything yet: this resume records, and the pause after it keeps that.
    api.resume("one").expect(200);
    work.check(api, "one");
    assert_eq!(memory(api, "one", "replayed_pages"), 0);
    let second = api.pause("one").expect(200);
    for build in [&first["build"], &second["build"]] {
        let set = place.build(build.as_str().unwrap()).join("working-set");
        wait_for("a working set is kept", PATIENCE, || {
            set.is_file().then_some(())
        });
    }
    // The kernel remembered what was written, and the check of the rest found nothing.
    assert_eq!(capture(&place, &second["build"]), "pagemap_scan");

    api.resume("one").expect(200);
    work.check(api, "one");
    let replayed = wait_for("pages are replayed", PATIENCE, || {
        Some(memory(api, "one", "replayed_pages")).filter(|pages| *pages > 0)
    });
    assert!(memory(api, "one", "replay_hits") <= replayed);
    work.change(api, "one");
    let third = api.pause("one").expect(200);
    assert_eq!(capture(&place, &third["build"]), "pagemap_scan");
    api.resume("one").expect(200);
    work.check(api, "one");

    clones_record_and_then_replay(api, &work);

    api.destroy("one");
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}

fn clones_record_and_then_replay(api: &Api, work: &Workload) {
    api.snapshot("one", "tpl").expect(201);
    for clone in ["ca", "cb", "cc"] {
        api.create(clone, "tpl");
        work.clone().check(api, clone);
        assert_eq!(memory(api, clone, "replayed_pages"), 0, "{clone}");
        api.destroy(clone);
    }
    api.create("cd", "tpl");
    work.clone().check(api, "cd");
    assert!(memory(api, "cd", "replayed_pages") > 0);
    api.destroy("cd");
    api.delete("/v1/snapshots/tpl").expect(204);
}

#[test]
fn guest_is_loaded_behind_its_faults_and_a_pause_ends_that() {
    const NAME: &str = "guest_is_loaded_behind_its_faults_and_a_pause_ends_that";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(NAME, &reason),
    };
    let _turn = needs::one_at_a_time();
    let place = Place::new("tload", 6, Some(&inputs));
    place.reconfigure(&[("[engine]\n", "[engine]\nload_mib_per_s = 4\n")]);
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    api.create("one", "base");
    let mut work = Workload::start(api, "one", 16);
    api.pause("one").expect(200);

    // Paused in the middle of it: at 4 MiB a second, much is missing still.
    api.resume("one").expect(200);
    wait_for("loading has begun", PATIENCE, || {
        (memory(api, "one", "loaded_pages") > 256).then_some(())
    });
    api.pause("one").expect(200);
    api.resume("one").expect(200);
    work.check(api, "one");
    // A template of it, and it goes on loading.
    api.snapshot("one", "tpl").expect(201);
    let body = json!({ "id": "two", "template": "tpl" });
    api.post("/v1/sandboxes", &body).expect(201);
    work.clone().check(api, "two");
    api.destroy("two");
    api.delete("/v1/snapshots/tpl").expect(204);
    let paused = api.pause("one").expect(200);
    daemon.stop();

    // To its end: all that the build doesn't call zero, but what the guest gives back meanwhile.
    let stored = stored_pages(&place, &paused["build"]);
    assert!(stored > 4096, "{stored}");
    place.reconfigure(&[("load_mib_per_s = 4\n", "load_mib_per_s = 4000\n")]);
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    api.resume("one").expect(200);
    wait_for("all is loaded", PATIENCE, || {
        (memory(api, "one", "resident_pages") >= stored * 3 / 4).then_some(())
    });
    work.check(api, "one");
    api.destroy("one");
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}
