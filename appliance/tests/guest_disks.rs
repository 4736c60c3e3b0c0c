//! A guest's disk and its connections, through the API of a daemon with real guests.

mod support;

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use support::daemon::Daemon;
use support::needs;
use support::place::{Place, names};
use support::{skip, wait_for};

const MIB: u64 = 1 << 20;

#[test]
fn guest_disk_is_as_large_as_asked_and_says_what_it_takes() {
    const TEST: &str = "guest_disk_is_as_large_as_asked_and_says_what_it_takes";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(TEST, &reason),
    };
    let _turn = needs::one_at_a_time();
    let image = inputs.dir.join("base.ext4");
    let image_bytes = fs::metadata(&image).unwrap().len();
    let asked_mb = image_bytes / MIB + 100;
    let place = Place::new("tdisk", 40, Some(&inputs));
    let daemon = Daemon::start(&place);
    let api = &daemon.api;

    let host = api.get("/v1/host").expect(200);
    let disks = host["disks"].as_str().unwrap().to_owned();
    let create = |id: &str, template: &str, size_mb: u64| {
        let body = json!({ "id": id, "template": template, "disk_size_mb": size_mb });
        api.post("/v1/sandboxes", &body)
    };
    // Smaller than the image: nothing is made, and the answer says what would do.
    let refused = create("small", "base", 1);
    assert_eq!(refused.body["field"], "disk_size_mb", "{}", refused.body);
    refused.expect(400);

    create("one", "base", asked_mb).expect(201);
    let sectors: u64 = api.shell("one", "cat /sys/block/vda/size").parse().unwrap();
    assert_eq!(sectors * 512, asked_mb * MIB);
    // The file system was grown, too: it takes more than the image has.
    let blocks: u64 = api
        .shell("one", "set -- $(stat -f -c '%b %S' /); echo $(($1 * $2))")
        .parse()
        .unwrap();
    assert!(blocks > image_bytes, "a file system of {blocks} bytes");
    let stats = || api.get("/v1/sandboxes/one/disk").expect(200);
    let running = stats();
    assert!(
        disks.starts_with(running["backend"].as_str().unwrap()),
        "{running}, {disks}"
    );
    assert_eq!(running["size_bytes"], asked_mb * MIB);
    assert_eq!(running["full"], false);
    api.shell("one", "echo kept > /root/kept && sync");

    // Paused and back, it is the same; a template of it has the same size and no other.
    api.pause("one").expect(200);
    assert_eq!(stats()["size_bytes"], asked_mb * MIB);
    api.resume("one").expect(200);
    assert_eq!(api.shell("one", "cat /root/kept"), "kept");
    api.snapshot("one", "grown").expect(201);
    let refused = create("two", "grown", asked_mb + 1);
    assert_eq!(refused.body["field"], "disk_size_mb", "{}", refused.body);
    assert!(
        refused.detail().contains(&asked_mb.to_string()),
        "{}",
        refused.body
    );
    refused.expect(400);
    create("two", "grown", asked_mb).expect(201);
    // Its own disk: what the clone writes, the sandbox doesn't see.
    assert_eq!(
        api.shell("two", "cat /root/kept; echo two > /root/kept; sync"),
        "kept"
    );
    assert_eq!(api.shell("one", "sync; cat /root/kept"), "kept");
    api.get("/v1/sandboxes/three/disk").expect(404);
    api.destroy("one");
    api.destroy("two");
    api.delete("/v1/snapshots/grown").expect(204);
    assert_eq!(place.leftovers(), Vec::<String>::new());

    // The grown image is kept for the next one, under the image's identity.
    let kept = names(&place.data.join("bases"));
    assert_eq!(
        kept.iter().filter(|name| name.ends_with("mb")).count(),
        1,
        "{kept:?}"
    );
    assert_unchanged(&image, image_bytes);
    daemon.stop();
    assert_eq!(place.leftovers_of_the_daemon(), Vec::<String>::new());
}

fn assert_unchanged(image: &Path, bytes: u64) {
    assert_eq!(
        fs::metadata(image).unwrap().len(),
        bytes,
        "the template's image"
    );
}

#[test]
fn guest_commands_are_awaited_by_a_pause_up_to_a_bound() {
    const TEST: &str = "guest_commands_are_awaited_by_a_pause_up_to_a_bound";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(TEST, &reason),
    };
    let _turn = needs::one_at_a_time();
    let place = Place::new("tdrain", 41, Some(&inputs));
    place.reconfigure(&[("[network]\n", "[network]\ndrain_ms = 8000\n")]);
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    api.create("one", "base");
    let start = |script: &'static str| {
        let api = api.clone();
        std::thread::spawn(move || api.exec("one", "sh", &["-c", script]))
    };
    let begun = |mark: &str| {
        let test = format!("test -e {mark} && echo yes || true");
        wait_for("the command has begun", Duration::from_secs(60), || {
            (api.shell("one", &test) == "yes").then_some(())
        });
    };

    // It ends soon: the pause lets it.
    let soon = start("touch /run/soon; sleep 0.5; echo done");
    begun("/run/soon");
    api.pause("one").expect(200);
    let ran = soon.join().unwrap().expect(200);
    assert_eq!(ran["stdout"], "done\n", "{ran}");

    // It doesn't: the pause goes on without it, and the caller hears why.
    api.resume("one").expect(200);
    let long = start("touch /run/long; sleep 600");
    begun("/run/long");
    let paused = api.pause("one").expect(200);
    assert_eq!(paused["state"], "paused");
    let cut = long.join().unwrap();
    assert!(
        cut.detail().contains("rest of its output is lost"),
        "{}",
        cut.body
    );
    cut.expect(409);
    api.destroy("one");
    daemon.stop();
}
