//! The limits of a guest's disk: its own, and the host's where it has none.

use std::fs;

use serde_json::{Value, json};

use crate::PLAYER;
use crate::support::daemon::Daemon;
use crate::support::fake::subject::{Inside, Subject, place};
use crate::support::fake::{Fault, Kind, Vmm};

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

pub(super) fn a_disk_has_the_limits_that_it_is_given(instance: &str, pool: u16, vmm: Vmm) {
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

pub(super) fn disks_have_the_limits_of_the_configuration(instance: &str, pool: u16, vmm: Vmm) {
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
