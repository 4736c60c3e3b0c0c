//! The file service, method by method.

use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::json;

use crate::client::Daemon;

#[test]
fn entry_tells_kind_size_permissions_and_owner() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file.txt");
    std::fs::write(&file, b"hello").unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).unwrap();
    symlink("file.txt", directory.path().join("link")).unwrap();

    let (status, answer) = daemon.ask("Stat", &json!({"path": file}));
    let entry = &answer["entry"];
    assert_eq!(status, 200, "{answer}");
    assert_eq!(entry["name"], "file.txt");
    assert_eq!(entry["type"], "FILE_TYPE_FILE");
    assert_eq!(
        (&entry["size"], &entry["mode"]),
        (&json!("5"), &json!(0o640))
    );
    assert_eq!(entry["permissions"], "-rw-r-----");
    let id = std::process::Command::new("id")
        .arg("-un")
        .output()
        .unwrap();
    assert_eq!(entry["owner"], String::from_utf8(id.stdout).unwrap().trim());
    assert!(entry["modifiedTime"].as_str().unwrap().ends_with('Z'));
    assert_eq!(entry.get("symlinkTarget"), None);

    let (_, answer) = daemon.ask("Stat", &json!({"path": directory.path().join("link")}));
    assert_eq!(answer["entry"]["symlinkTarget"], "file.txt");
    assert_eq!(answer["entry"]["isSymlink"], true);
    let (status, answer) = daemon.ask("Stat", &json!({"path": directory.path().join("none")}));
    assert_eq!((status, &answer["code"]), (404, &json!("not_found")));
    let (status, answer) = daemon.ask("Stat", &json!({"path": "/a\0b"}));
    assert_eq!((status, &answer["code"]), (400, &json!("invalid_argument")));
    assert_eq!(
        daemon.ask("Stat", &json!({"path": "/"})).1["entry"]["type"],
        "FILE_TYPE_DIRECTORY"
    );
}

#[test]
fn directories_are_made_listed_moved_and_removed() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let (status, made) = daemon.ask("MakeDir", &json!({"path": at("a/b/c")}));
    assert_eq!((status, &made["entry"]["name"]), (200, &json!("c")));
    let (status, again) = daemon.ask("MakeDir", &json!({"path": at("a/b/c")}));
    assert_eq!((status, &again["code"]), (409, &json!("already_exists")));
    std::fs::write(at("a/file"), b"x").unwrap();
    let (_, through) = daemon.ask("MakeDir", &json!({"path": at("a/file/x")}));
    assert_eq!(through["code"], "invalid_argument");

    let names = |depth: u32| -> Vec<String> {
        let (status, list) = daemon.ask("ListDir", &json!({"path": at("a"), "depth": depth}));
        assert_eq!(status, 200, "{list}");
        let entries = list["entries"].as_array().cloned().unwrap_or_default();
        entries
            .iter()
            .map(|e| e["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(0), ["b", "file"]);
    assert_eq!(names(2), ["b", "c", "file"]);
    assert_eq!(
        daemon.ask("ListDir", &json!({"path": at("a/file")})).1["code"],
        "invalid_argument"
    );
    assert_eq!(
        daemon.ask("ListDir", &json!({"path": at("none")})).1["code"],
        "not_found"
    );

    let (status, moved) = daemon.ask(
        "Move",
        &json!({"source": at("a/file"), "destination": at("new/place")}),
    );
    assert_eq!(
        (status, &moved["entry"]["path"]),
        (200, &json!(at("new/place")))
    );
    let gone = json!({"source": at("a/file"), "destination": at("other/place")});
    assert_eq!(daemon.ask("Move", &gone).1["code"], "not_found");
    assert!(
        !at("other").exists(),
        "nothing is made for what isn't there"
    );

    symlink(at("new"), at("a/link")).unwrap();
    assert_eq!(daemon.ask("Remove", &json!({"path": at("a")})).0, 200);
    assert!(!at("a").exists() && at("new/place").exists());
    assert_eq!(
        daemon.ask("Remove", &json!({"path": at("a")})).0,
        200,
        "again"
    );
    assert_eq!(
        daemon.ask("Remove", &json!({"path": "/"})).1["code"],
        "invalid_argument"
    );
}

#[test]
fn what_is_made_for_a_user_is_the_users() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: what_is_made_for_a_user_is_the_users: needs root");
        return;
    }
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("above/below");
    // base64 of "nobody:".
    let headers = [
        ("content-type", "application/json"),
        ("authorization", "Basic bm9ib2R5Og=="),
    ];
    let body = json!({"path": path}).to_string();
    let answer = daemon.call("POST", "/filesystem.Filesystem/MakeDir", &headers, &body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    for made in [path.parent().unwrap(), &path] {
        let (_, answer) = daemon.ask("Stat", &json!({"path": made}));
        assert_eq!(answer["entry"]["owner"], "nobody");
    }
    let headers = [
        ("content-type", "application/json"),
        ("authorization", "Basic bm8tc3VjaDo="),
    ];
    let answer = daemon.call("POST", "/filesystem.Filesystem/MakeDir", &headers, &body);
    assert_eq!(answer.status, 401, "no such user");
}

#[test]
fn daemons_own_descriptors_lead_nowhere() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    symlink("/proc/self/root", directory.path().join("link")).unwrap();
    for path in [
        "/proc/self/root/etc",
        "/proc/self/cwd/x",
        "/proc/self/fd/0/x",
    ] {
        assert_ne!(
            daemon.ask("ListDir", &json!({"path": path})).0,
            200,
            "{path}"
        );
    }
    let through = directory.path().join("link/etc");
    assert_ne!(daemon.ask("ListDir", &json!({"path": through})).0, 200);
}
