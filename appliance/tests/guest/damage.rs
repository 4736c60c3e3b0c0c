//! Generation after generation of one guest, and what is said when one of their files is damaged.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::daemon::{Daemon, run};
use crate::support::place::Place;
use crate::support::workload::Workload;
use crate::support::{guest_mb, needs, skip};
use crate::{start, text};

#[test]
fn guest_is_intact_through_generations_and_damage() {
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip("guest_is_intact_through_generations_and_damage", &reason),
    };
    let _turn = needs::one_at_a_time();
    let (place, daemon) = start("tgen", 2, &inputs);
    let api = &daemon.api;
    api.create("one", "base");
    let mut work = Workload::start(api, "one", 16);

    let mut parent = Value::Null;
    let mut build = String::new();
    for generation in 0..5 {
        let paused = api.pause("one").expect(200);
        assert_eq!(paused["generation"], generation, "{paused}");
        build = text(&paused["build"]);
        let dir = place.build(&build);
        let found = inspect(&dir);
        assert_eq!(found["build_id"], json!(build), "{found}");
        assert_eq!(found["generation"], generation, "{found}");
        assert_eq!(found["parent"], parent, "{found}");
        parent = json!(build);
        pages_add_up(&found, generation);
        if generation < 4 {
            api.resume("one").expect(200);
            work.check(api, "one");
            work.change(api, "one");
        }
    }
    let dir = place.build(&build);
    let path = dir.to_str().unwrap();
    let verified = run(&["snapshot", "verify", path, "--ancestors", "--json"]);
    let report: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert!(verified.status.success(), "{report}");
    assert_eq!(report["faults"], json!([]), "{report}");
    assert!(!report["ancestors"].as_array().unwrap().is_empty());

    damage_is_refused_by_name(&place, &daemon, &dir);
    let ancestor = text(&report["ancestors"][0]);
    let data = place.build(&ancestor).join("memory.data");
    refuses(&place, &daemon, &data, Damage::Flip);

    api.resume("one").expect(200);
    assert!(api.sandbox("one").body.get("reason").is_none());
    work.check(api, "one");
    api.destroy("one");
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}

fn inspect(dir: &Path) -> Value {
    let output = run(&["snapshot", "inspect", dir.to_str().unwrap(), "--json"]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn pages_add_up(found: &Value, generation: u64) {
    let number = |key: &str| found[key].as_u64().unwrap();
    let pages = guest_mb() << 8;
    assert_eq!(number("memory_pages"), pages, "{found}");
    assert_eq!(number("memory_bytes"), guest_mb() << 20, "{found}");
    let sum = number("zero_pages") + number("own_pages") + number("inherited_pages");
    assert_eq!(sum, pages, "{found}");
    assert!(number("own_pages") > 0, "{found}");
    assert_eq!(number("inherited_pages") > 0, generation > 0, "{found}");
    // A diff is small: most of what the guest holds is in its ancestors.
    if generation > 0 {
        assert!(number("own_pages") < number("inherited_pages"), "{found}");
    }
    let table = found["builds"].as_array().unwrap();
    let own = table.last().unwrap();
    assert_eq!(own["build_id"], found["build_id"], "{found}");
    assert_eq!(own["referenced_pages"], found["own_pages"], "{found}");
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Flip,
    Cut,
}

/// A damaged file; whole again when this is dropped.
struct Damaged {
    path: PathBuf,
    at: u64,
    original: Vec<u8>,
}

impl Damaged {
    fn new(path: &Path, damage: Damage) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        let (at, count) = match damage {
            Damage::Flip => (len / 2, 1),
            Damage::Cut => (len - 1000.min(len / 2), 1000.min(len / 2)),
        };
        let mut original = vec![0; count as usize];
        file.read_exact_at(&mut original, at).unwrap();
        match damage {
            Damage::Flip => file.write_all_at(&[original[0] ^ 0x40], at).unwrap(),
            Damage::Cut => file.set_len(at).unwrap(),
        }
        Self {
            path: path.to_owned(),
            at,
            original,
        }
    }
}

impl Drop for Damaged {
    fn drop(&mut self) {
        let file = File::options().write(true).open(&self.path).unwrap();
        file.write_all_at(&self.original, self.at).unwrap();
    }
}

fn damage_is_refused_by_name(place: &Place, daemon: &Daemon, dir: &Path) {
    for name in [
        "memory.map",
        "memory.data",
        "memory.sums",
        "vmstate",
        "manifest.json",
    ] {
        for damage in [Damage::Flip, Damage::Cut] {
            refuses(place, daemon, &dir.join(name), damage);
        }
    }
}

fn refuses(place: &Place, daemon: &Daemon, path: &Path, damage: Damage) {
    let api = &daemon.api;
    let damaged = Damaged::new(path, damage);
    let refused = api.resume("one");
    drop(damaged);
    let what = format!("{damage:?} of {}: {}", path.display(), refused.body);
    assert_eq!(refused.status, 422, "{what}");
    let name = path.display().to_string();
    for part in [&*name, "offset", "expected", "found"] {
        assert!(refused.detail().contains(part), "no {part:?}: {what}");
    }
    let sandbox = api.sandbox("one").expect(200);
    assert_eq!(sandbox["state"], "paused", "{what}");
    assert_eq!(place.sandbox_leftovers(), Vec::<String>::new(), "{what}");
}
