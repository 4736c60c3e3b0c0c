//! Watches, as a stream and as a watcher that is asked.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Daemon, Json};

fn watch(daemon: &Daemon, path: &Path, more: &Value) -> Json {
    let mut request = json!({"path": path});
    request
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let mut events = daemon.open_json("/filesystem.Filesystem/WatchDir", &[], &request);
    assert_eq!(events.next().unwrap(), json!({"start": {}}));
    events
}

/// Changes until one has this name and type, as "TYPE name".
fn changes_until(events: &mut Json, last: &str) -> Vec<String> {
    let mut told = Vec::new();
    while told.last().map(String::as_str) != Some(last) {
        let event = events
            .next()
            .unwrap_or_else(|end| panic!("{end:?} after {told:?}"));
        let event = &event["filesystem"];
        let kind = event["type"]
            .as_str()
            .unwrap()
            .trim_start_matches("EVENT_TYPE_")
            .to_owned();
        told.push(format!("{kind} {}", event["name"].as_str().unwrap()));
    }
    told
}

#[test]
fn changes_are_told_with_renames_in_pairs() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut events = watch(&daemon, directory.path(), &json!({}));
    std::fs::write(at("one"), b"x").unwrap();
    std::fs::rename(at("one"), at("two")).unwrap();
    std::fs::remove_file(at("two")).unwrap();
    std::fs::create_dir(at("sub")).unwrap();
    std::fs::write(at("sub/unseen"), b"x").unwrap();
    std::fs::write(at("last"), b"x").unwrap();
    let told = changes_until(&mut events, "WRITE last");
    let expected = [
        "CREATE one",
        "WRITE one",
        "RENAME one",
        "CREATE two",
        "REMOVE two",
        "CREATE sub",
        "CREATE last",
        "WRITE last",
    ];
    assert_eq!(told, expected);
}

#[test]
fn directories_that_appear_later_are_watched_with_what_is_in_them() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir_in(directory.path().parent().unwrap()).unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir_all(at("old/deep")).unwrap();
    let mut events = watch(&daemon, directory.path(), &json!({"recursive": true}));
    std::fs::create_dir_all(at("a/b/c")).unwrap();
    std::fs::write(at("a/b/c/file"), b"x").unwrap();
    let told = changes_until(&mut events, "CREATE a/b/c/file");
    for created in [
        "CREATE a",
        "CREATE a/b",
        "CREATE a/b/c",
        "CREATE a/b/c/file",
    ] {
        assert_eq!(
            told.iter().filter(|told| *told == created).count(),
            1,
            "{told:?}"
        );
    }
    std::fs::write(at("old/deep/file"), b"x").unwrap();
    changes_until(&mut events, "CREATE old/deep/file");

    // Moved within: the same watches under a new name. Moved away: none.
    std::fs::rename(at("a/b"), at("moved")).unwrap();
    changes_until(&mut events, "CREATE moved");
    std::fs::write(at("moved/c/again"), b"x").unwrap();
    changes_until(&mut events, "CREATE moved/c/again");
    std::fs::rename(at("moved"), elsewhere.path().join("gone")).unwrap();
    changes_until(&mut events, "RENAME moved");
    std::thread::sleep(Duration::from_millis(300));
    std::fs::write(elsewhere.path().join("gone/c/unseen"), b"x").unwrap();
    std::fs::write(at("last"), b"x").unwrap();
    let told = changes_until(&mut events, "CREATE last");
    assert_eq!(
        told,
        ["CREATE last"],
        "of what is elsewhere nothing is told"
    );
}

#[test]
fn uploads_are_told_of_under_their_names() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let mut events = watch(&daemon, directory.path(), &json!({"includeEntry": true}));
    let path = format!("/files?path={}/up", directory.path().display());
    assert_eq!(daemon.call("POST", &path, &[], "one").status, 200);
    assert_eq!(daemon.call("POST", &path, &[], "three").status, 200);
    std::fs::write(directory.path().join("last"), b"").unwrap();
    let mut told = Vec::new();
    loop {
        let event = events.next().unwrap()["filesystem"].clone();
        if event["name"] == "last" {
            break;
        }
        assert_eq!(event["entry"]["path"], json!(directory.path().join("up")));
        told.push(format!(
            "{} {}",
            event["type"].as_str().unwrap(),
            event["name"].as_str().unwrap()
        ));
    }
    let expected = [
        "EVENT_TYPE_CREATE up",
        "EVENT_TYPE_WRITE up",
        "EVENT_TYPE_WRITE up",
    ];
    assert_eq!(told, expected);
}

#[test]
fn watcher_collects_until_it_is_asked() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let (status, created) = daemon.ask("CreateWatcher", &json!({"path": directory.path()}));
    assert_eq!(status, 200, "{created}");
    let id = json!({"watcherId": created["watcherId"]});
    assert_eq!(daemon.ask("GetWatcherEvents", &id), (200, json!({})));
    std::fs::write(directory.path().join("file"), b"x").unwrap();
    let mut names = Vec::new();
    let give_up = Instant::now() + Duration::from_secs(10);
    while names.len() < 2 && Instant::now() < give_up {
        let (_, answer) = daemon.ask("GetWatcherEvents", &id);
        for event in answer["events"].as_array().into_iter().flatten() {
            names.push(event["type"].as_str().unwrap().to_owned());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(names, ["EVENT_TYPE_CREATE", "EVENT_TYPE_WRITE"]);
    assert_eq!(daemon.ask("RemoveWatcher", &id).0, 200);
    for method in ["RemoveWatcher", "GetWatcherEvents"] {
        assert_eq!(daemon.ask(method, &id).1["code"], "not_found");
    }
}

#[test]
fn what_cannot_be_watched_is_refused_with_its_code() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, b"x").unwrap();
    for (path, code) in [
        (directory.path().join("none"), "not_found"),
        (file, "invalid_argument"),
    ] {
        let (_, answer) = daemon.ask("CreateWatcher", &json!({"path": path}));
        assert_eq!(answer["code"], code);
        let request = json!({"path": path});
        let mut events = daemon.open_json("/filesystem.Filesystem/WatchDir", &[], &request);
        assert_eq!(events.next().unwrap_err().error.unwrap().code, code);
    }
}

#[test]
fn watched_directory_that_goes_away_ends_the_watch_with_an_error() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let watched = directory.path().join("watched");
    std::fs::create_dir(&watched).unwrap();
    let mut events = watch(&daemon, &watched, &json!({"recursive": true}));
    std::fs::remove_dir(&watched).unwrap();
    assert_eq!(events.next().unwrap_err().error.unwrap().code, "not_found");
}

#[test]
fn changes_that_are_too_many_end_the_watch_with_an_error() {
    let daemon = Daemon::start();
    // In memory, if there is such a place: it is a lot of changes.
    let directory = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let events = watch(&daemon, directory.path(), &json!({}));
    // Nobody reads the stream meanwhile: the socket, our queue and the kernel's fill up.
    let limit = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    if limit > 200_000 {
        let test = "changes_that_are_too_many_end_the_watch_with_an_error";
        return println!("skipped: {test}: max_queued_events is {limit}");
    }
    let name = "n".repeat(200);
    for number in 0..limit + 40_000 {
        let path = directory.path().join(format!("{name}{}", number % 2));
        std::fs::create_dir(&path).unwrap();
        std::fs::remove_dir(&path).unwrap();
    }
    let mut events = events;
    let error = loop {
        match events.next() {
            Ok(_) => {}
            Err(end) => break end.error.unwrap(),
        }
    };
    assert_eq!(error.code, "data_loss", "{}", error.message);
}

#[test]
fn network_mount_is_refused_unless_it_is_allowed() {
    let Some(mount) = fuse() else {
        let test = "network_mount_is_refused_unless_it_is_allowed";
        return println!("skipped: {test}: no network or FUSE file system is mounted here");
    };
    let daemon = Daemon::start();
    let (_, answer) = daemon.ask("CreateWatcher", &json!({"path": mount}));
    assert_eq!(answer["code"], "invalid_argument");
    let allowed = json!({"path": mount, "allowNetworkMounts": true});
    assert_eq!(daemon.ask("CreateWatcher", &allowed).0, 200);
}

/// A mount point whose changes may come from elsewhere.
fn fuse() -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let mut lines = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let found = lines.find(|fields| {
        let kind = fields[2];
        kind.starts_with("fuse.") || ["nfs", "nfs4", "cifs", "9p", "ceph"].contains(&kind)
    })?;
    Some(found[1].to_owned())
}
