//! Guests whose memory is of huge pages: what they need of the host is promised to them before they
//! start, and their memory is served and saved in such pages.

mod support;

use std::fs;

use serde_json::{Value, json};
use snapshot_format::{BuildStore, PageSize};
use support::api::Api;
use support::daemon::Daemon;
use support::fake::subject::{Inside, MEMORY_MB, Subject, place};
use support::fake::{self, Kind, Vmm};
use support::huge::{self, Allowed};
use support::place::Place;
use support::workload::Workload;
use support::{needs, skip};

/// The test that a fake's process runs as.
const PLAYER: &str = "fakes_are_played_here";

#[test]
fn fakes_are_played_here() {
    fake::run_if_wanted();
}

fn asked(id: &str, template: &str) -> Value {
    json!({ "id": id, "template": template, "huge_pages": true })
}

fn page_size(place: &Place, paused: &Value) -> PageSize {
    let store = BuildStore::open_or_create(&place.data.join("builds")).unwrap();
    let build = paused["build"].as_str().unwrap().parse().unwrap();
    store.open(&build).unwrap().map().page_size()
}

/// A guest that the host has no huge pages for is refused, and told what to do.
fn is_refused(api: &Api, id: &str) {
    let refused = api.post("/v1/sandboxes", &asked(id, "base"));
    assert_eq!(refused.status, 507, "{}", refused.body);
    let detail = refused.detail();
    assert!(detail.contains("vm.nr_hugepages"), "{detail}");
    api.sandbox(id).expect(404);
}

#[test]
fn huge_pages_in_a_firecracker_are_had_as_far_as_there_are_some() {
    const NAME: &str = "huge_pages_in_a_firecracker_are_had_as_far_as_there_are_some";
    live(NAME, ("tfhuge", 181), Kind::FIRECRACKER);
}

#[test]
fn huge_pages_in_a_cloud_hypervisor_are_had_as_far_as_there_are_some() {
    const NAME: &str = "huge_pages_in_a_cloud_hypervisor_are_had_as_far_as_there_are_some";
    live(NAME, ("tchuge", 182), Kind::CLOUD_HYPERVISOR);
}

#[test]
fn huge_pages_in_a_cloud_hypervisor_that_asks_for_none_are_kept() {
    const NAME: &str = "huge_pages_in_a_cloud_hypervisor_that_asks_for_none_are_kept";
    live(NAME, ("tchugo", 183), Kind::OLD_CLOUD_HYPERVISOR);
}

fn live(test: &str, (instance, pool): (&str, u16), kind: Kind) {
    let able = needs::for_fakes().and_then(|()| huge::turn());
    let turn = match able {
        Ok(turn) => turn,
        Err(reason) => return skip(test, &reason),
    };
    let place = place(instance, pool, kind.vmm);
    let subject = Subject::start_in(place, kind, PLAYER);
    let api = &subject.daemon.api;
    is_refused(api, "none");

    // Two guests at a time.
    let _allowed = match Allowed::mib(turn, 2 * MEMORY_MB) {
        Ok(allowed) => allowed,
        Err(reason) => return skip(test, &reason),
    };
    let made = api.post("/v1/sandboxes", &asked("one", "base")).expect(201);
    assert_eq!(made["huge_pages"], true, "{made}");
    let one = Inside::of(&made);
    one.fill(700, 600, 1);
    let (hash, count) = (one.hash(), one.count());
    let paused = api.pause("one").expect(200);
    assert_eq!(page_size(&subject.place, &paused), PageSize::Size2M);
    for cycle in 0..3 {
        api.resume("one").expect(200);
        one.runs_on_from(count);
        let memory = api.get("/v1/sandboxes/one/memory").expect(200);
        assert_eq!(memory["page_bytes"], 2 << 20, "{memory}");
        assert_eq!(memory["guest_pages"], MEMORY_MB / 2, "{memory}");
        if cycle == 0 {
            // The counter's, and little more; later on, what it had touched comes by itself.
            let is_lazy = kind.vmm == Vmm::Firecracker;
            let resident = memory["resident_pages"].as_u64().unwrap();
            assert!(resident < 4 || !is_lazy, "{memory}");
            assert_eq!(one.hash(), hash);
        }
        one.fill(700 + cycle * 100, 50, 2 + cycle);
        one.give_back(2 * 512, 512);
        let hash = one.hash();
        let paused = api.pause("one").expect(200);
        assert_eq!(page_size(&subject.place, &paused), PageSize::Size2M);
        let stored = api.get("/v1/sandboxes/one/memory").expect(200)["diff_pages"].clone();
        assert!(stored.as_u64().unwrap() <= 3, "cycle {cycle}: {stored}");
        api.resume("one").expect(200);
        assert_eq!(one.hash(), hash, "cycle {cycle}");
        api.pause("one").expect(200);
    }

    // It is of its template's pages, like it or not; two run, and a third has no room.
    api.resume("one").expect(200);
    api.snapshot("one", "warm").expect(201);
    let warm = api.get("/v1/snapshots/warm").expect(200);
    assert_eq!(warm["huge_pages"], true, "{warm}");
    let other = json!({ "id": "two", "template": "warm", "huge_pages": false });
    let refused = api.post("/v1/sandboxes", &other).expect(400);
    assert_eq!(refused["field"], "huge_pages", "{refused}");
    let hash = one.hash();
    let two = Inside::of(&api.create("two", "warm"));
    assert_eq!(two.hash(), hash);
    is_refused(api, "three");
    api.pause("two").expect(200);
    api.post("/v1/sandboxes", &asked("three", "base"))
        .expect(201);
    // Resumed only when there is room again, and untouched by the refusal.
    let refused = api.post("/v1/sandboxes/two/resume", &json!({}));
    assert_eq!(refused.status, 507, "{}", refused.body);
    api.destroy("three");
    api.resume("two").expect(200);
    assert_eq!(two.hash(), hash);
    subject.end();
}

#[test]
fn guest_of_huge_pages_keeps_all_it_has() {
    const NAME: &str = "guest_of_huge_pages_keeps_all_it_has";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(NAME, &reason),
    };
    let _turn = needs::one_at_a_time();
    let allowed = huge::turn().and_then(|turn| Allowed::mib(turn, 1024));
    let _allowed = match allowed {
        Ok(allowed) => allowed,
        Err(reason) => return skip(NAME, &reason),
    };
    let place = Place::new("thuge", 7, Some(&inputs));
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    api.post("/v1/sandboxes", &asked("one", "base")).expect(201);
    let mut work = Workload::start(api, "one", 16);
    let paused = api.pause("one").expect(200);
    assert_eq!(page_size(&place, &paused), PageSize::Size2M);
    for _ in 0..2 {
        api.resume("one").expect(200);
        work.check(api, "one");
        work.change(api, "one");
        let paused = api.pause("one").expect(200);
        let manifest = place
            .build(paused["build"].as_str().unwrap())
            .join("manifest.json");
        let manifest: Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
        // The kernel remembered what was written, and the check of the rest found nothing.
        assert_eq!(manifest["labels"]["capture"], "pagemap_scan", "{manifest}");
    }
    api.resume("one").expect(200);
    work.check(api, "one");
    api.snapshot("one", "warm").expect(201);
    api.create("two", "warm");
    work.clone().check(api, "two");
    work.check(api, "one");
    api.delete_all();
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}
