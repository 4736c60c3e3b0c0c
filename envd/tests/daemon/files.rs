//! `/files`: uploads, downloads, signatures, and files made of others.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;

use flate2::Compression;
use serde_json::{Value, json};

use crate::client::{Daemon, read_all, read_response};

fn get(daemon: &Daemon, path: &str, headers: &[(&str, &str)]) -> (crate::client::Head, Vec<u8>) {
    read_all(daemon.send("GET", path, headers, b""))
}

#[test]
fn upload_makes_parents_and_download_gives_it_back() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let path = format!("/files?path={}/a/b%20c/f", directory.path().display());
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let headers = [
        ("content-type", "application/octet-stream"),
        ("x-metadata-Kind", "test"),
    ];
    let (status, body) = read_response(daemon.send("POST", &path, &headers, &content));
    let told: Value = serde_json::from_slice(&body).unwrap();
    let expected = json!([{
        "path": directory.path().join("a/b c/f"),
        "name": "f", "type": "file", "metadata": {"kind": "test"},
    }]);
    assert_eq!((status, told), (200, expected));
    assert_eq!(
        std::fs::read(directory.path().join("a/b c/f")).unwrap(),
        content
    );
    let (head, body) = get(&daemon, &path, &[]);
    assert_eq!((head.status, body == content), (200, true));
    assert_eq!(head.headers["content-length"], "3000000");
    let (_, entry) = daemon.ask("Stat", &json!({"path": directory.path().join("a/b c/f")}));
    assert_eq!(entry["entry"]["metadata"], json!({"kind": "test"}));
    // Another upload replaces the metadata, too.
    assert_eq!(daemon.call("POST", &path, &[], "x").status, 200);
    let (_, entry) = daemon.ask("Stat", &json!({"path": directory.path().join("a/b c/f")}));
    assert_eq!(entry["entry"].get("metadata"), None);
}

#[test]
fn parts_of_files_are_served_and_held_to_one_version() {
    let daemon = Daemon::start();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"0123456789").unwrap();
    let path = format!("/files?path={}", file.path().display());
    let (head, body) = get(&daemon, &path, &[("range", "bytes=2-4")]);
    assert_eq!((head.status, body.as_slice()), (206, &b"234"[..]));
    assert_eq!(head.headers["content-range"], "bytes 2-4/10");
    let tag = head.headers["etag"].clone();
    let (head, body) = get(&daemon, &path, &[("range", "bytes=-2"), ("if-range", &tag)]);
    assert_eq!((head.status, body.as_slice()), (206, &b"89"[..]));
    let (head, _) = get(&daemon, &path, &[("range", "bytes=10-")]);
    assert_eq!(
        (head.status, head.headers["content-range"].as_str()),
        (416, "bytes */10")
    );
    std::fs::write(file.path(), b"changed!").unwrap();
    let (head, body) = get(&daemon, &path, &[("range", "bytes=-2"), ("if-range", &tag)]);
    assert_eq!((head.status, body.as_slice()), (200, &b"changed!"[..]));
}

#[test]
fn gzip_goes_both_ways() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let path = format!("/files?path={}/z", directory.path().display());
    let content = b"compress me ".repeat(100_000);
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(&content).unwrap();
    let packed = packed.finish().unwrap();
    let headers = [("content-encoding", "gzip")];
    assert_eq!(
        read_response(daemon.send("POST", &path, &headers, &packed)).0,
        200
    );
    assert_eq!(std::fs::read(directory.path().join("z")).unwrap(), content);
    let (head, body) = get(&daemon, &path, &[("accept-encoding", "gzip")]);
    assert_eq!(head.headers["content-encoding"], "gzip");
    assert!(body.len() < content.len() / 10);
    let mut unpacked = Vec::new();
    flate2::read::GzDecoder::new(body.as_slice())
        .read_to_end(&mut unpacked)
        .unwrap();
    assert_eq!(unpacked, content);
    let (head, _) = get(&daemon, &path, &[("accept-encoding", "identity;q=0")]);
    assert_eq!(head.status, 406);

    for broken in [&packed[..packed.len() - 9], b"not gzip at all"] {
        let (status, body) = read_response(daemon.send("POST", &path, &headers, broken));
        assert_eq!(status, 400, "{}", String::from_utf8_lossy(&body));
    }
    assert_eq!(
        std::fs::read(directory.path().join("z")).unwrap(),
        content,
        "untouched"
    );
    let (status, _) = read_response(daemon.send("POST", &path, &[("content-encoding", "br")], b""));
    assert_eq!(status, 415);
}

fn form(parts: &[(&str, &str)]) -> String {
    let mut body = String::new();
    for (disposition, content) in parts {
        body.push_str(&format!(
            "--XX\r\nContent-Disposition: form-data; {disposition}\r\n\
             Content-Type: application/octet-stream\r\n\r\n{content}\r\n"
        ));
    }
    body + "--XX--\r\n"
}

#[test]
fn parts_of_a_form_are_files_with_raw_absolute_names() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let headers = [("content-type", "multipart/form-data; boundary=XX")];
    let part = |name: &str| format!(r#"name="file"; filename="{}""#, at(name).display());
    let body = form(&[
        (&part("one"), "1"),
        (r#"name="other"; filename="/nowhere/else""#, "ignored"),
        (&part("sub/two %22"), "22"),
    ]);
    let (status, answer) = read_response(daemon.send("POST", "/files", &headers, body.as_bytes()));
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
    assert_eq!(std::fs::read(at("one")).unwrap(), b"1");
    assert_eq!(std::fs::read(at("sub/two \"")).unwrap(), b"22");

    // The parameter wins over a single name.
    let path = format!("/files?path={}", at("three").display());
    let body = form(&[(&part("not-this"), "333")]);
    assert_eq!(
        read_response(daemon.send("POST", &path, &headers, body.as_bytes())).0,
        200
    );
    assert_eq!(std::fs::read(at("three")).unwrap(), b"333");
    assert!(!at("not-this").exists());

    let both = form(&[(&part("same"), "a"), (&part("./same"), "b")]);
    let nameless = form(&[(r#"name="file""#, "a")]);
    let cut = &form(&[(&part("cut"), "abc")])[..90];
    for body in [both.as_str(), &nameless, cut, "--XX--\r\n", ""] {
        let (status, answer) =
            read_response(daemon.send("POST", "/files", &headers, body.as_bytes()));
        assert_eq!(status, 400, "{body}: {}", String::from_utf8_lossy(&answer));
    }
    assert!(!at("cut").exists());
}

#[test]
fn upload_that_breaks_off_leaves_what_was_there() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, b"before").unwrap();
    let inode = std::fs::metadata(&file).unwrap().ino();
    let mut stream = TcpStream::connect(daemon.address()).unwrap();
    let head = format!(
        "POST /files?path={} HTTP/1.1\r\nhost: guest\r\ncontent-length: 1000000\r\n\r\n",
        file.display()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&[b'x'; 300_000]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(200));
    drop(stream);
    let give_up = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while std::fs::read_dir(directory.path()).unwrap().count() > 1 {
        assert!(
            std::time::Instant::now() < give_up,
            "the hidden file is removed"
        );
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"before");
    assert_eq!(std::fs::metadata(&file).unwrap().ino(), inode);
}

#[test]
fn errors_have_their_statuses() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| format!("/files?path={}", directory.path().join(name).display());
    for (method, path, status) in [
        ("GET", "/files".to_owned(), 400),
        ("POST", "/files".to_owned(), 400),
        ("GET", at("none"), 404),
        ("GET", at(""), 400),
        ("POST", at(""), 400),
        ("GET", at("none") + "&username=no-such-user", 401),
        ("POST", at("none") + "&username=no-such-user", 401),
        ("GET", "/files?path=%2Fa%00b".to_owned(), 400),
        ("GET", "/files?path=/dev/zero".to_owned(), 400),
    ] {
        let answer = daemon.call(method, &path, &[], "");
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
        let body: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(body["code"], status);
    }
    let cpus = daemon.call("GET", "/files?path=/proc/cpuinfo", &[], "");
    assert!(cpus.body.contains("processor"), "a file without a size");
}

#[test]
fn full_file_system_is_507_and_leaves_what_was_there() {
    let test = "full_file_system_is_507_and_leaves_what_was_there";
    let directory = tempfile::tempdir().unwrap();
    let Some(_mount) = small_file_system(directory.path()) else {
        return println!("skipped: {test}: mounting needs root");
    };
    let daemon = Daemon::start();
    std::fs::write(directory.path().join("f"), b"before").unwrap();
    let path = format!("/files?path={}/f", directory.path().display());
    // By its length before it is written, and without one when the disk is full.
    let big = vec![7; 4 << 20];
    let (status, body) = read_response(daemon.send("POST", &path, &[], &big));
    assert_eq!(status, 507, "{}", String::from_utf8_lossy(&body));
    let mut chunked = format!("{:x}\r\n", big.len()).into_bytes();
    chunked.extend(&big);
    chunked.extend(b"\r\n0\r\n\r\n");
    let mut stream = TcpStream::connect(daemon.address()).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: guest\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&chunked).unwrap();
    let (status, body) = read_response(stream);
    assert_eq!(status, 507, "{}", String::from_utf8_lossy(&body));
    assert_eq!(
        std::fs::read(directory.path().join("f")).unwrap(),
        b"before"
    );
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

/// A tmpfs of a megabyte, unmounted when dropped.
fn small_file_system(at: &std::path::Path) -> Option<Mounted> {
    use nix::mount::{MsFlags, mount};
    mount(
        Some("tmpfs"),
        at,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=1m"),
    )
    .ok()?;
    Some(Mounted(at.to_path_buf()))
}

struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn signature_stands_for_the_token_as_far_as_its_file_goes() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("f");
    std::fs::write(&file, b"content").unwrap();
    let init = r#"{"accessToken":"secret"}"#;
    assert_eq!(daemon.call("POST", "/init", &[], init).status, 204);
    let path = file.to_str().unwrap();
    let signed = |operation: &str, expiration: Option<u64>| {
        use base64::Engine as _;
        use sha2::Digest as _;
        let mut text = format!("{path}:{operation}::secret");
        let mut query = format!("/files?path={path}");
        if let Some(seconds) = expiration {
            text.push_str(&format!(":{seconds}"));
            query.push_str(&format!("&signature_expiration={seconds}"));
        }
        let digest = sha2::Sha256::digest(text);
        let digest = base64::engine::general_purpose::STANDARD_NO_PAD.encode(digest);
        let digest = digest.replace('+', "%2B").replace('/', "%2F");
        format!("{query}&signature=v1_{digest}")
    };
    let status = |method: &str, path: &str| daemon.call(method, path, &[], "new").status;
    assert_eq!(status("GET", &format!("/files?path={path}")), 401);
    assert_eq!(status("GET", &signed("read", None)), 200);
    assert_eq!(status("GET", &signed("read", Some(u64::MAX / 4))), 200);
    assert_eq!(status("GET", &signed("read", Some(1_000_000_000))), 401);
    assert_eq!(status("GET", &signed("write", None)), 401);
    assert_eq!(status("POST", &signed("read", None)), 401);
    assert_eq!(status("POST", &signed("write", None)), 200);
    let other = signed("read", None).replace("/files?", "/files/compose?");
    assert_eq!(status("POST", &other), 401, "it opens no other route");
    assert_eq!(std::fs::read(&file).unwrap(), b"new");
}

#[test]
fn files_are_composed_in_order_and_gone_afterwards() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut whole = Vec::new();
    for part in 0..3_u8 {
        let bytes = vec![b'a' + part; 70_000];
        std::fs::write(at(&format!("part{part}")), &bytes).unwrap();
        whole.extend(bytes);
    }
    let ask = |sources: &[&str], destination: &str| {
        let sources: Vec<_> = sources.iter().map(|name| at(name)).collect();
        let body = json!({"source_paths": sources, "destination": at(destination)});
        daemon.call("POST", "/files/compose", &[], &body.to_string())
    };
    assert_eq!(ask(&["part0", "none"], "out").status, 404);
    assert!(
        at("part0").exists() && !at("out").exists(),
        "nothing was done"
    );
    let answer = ask(&["part0", "part1", "part2"], "out");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let told: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(
        told,
        json!({"path": at("out"), "name": "out", "type": "file"})
    );
    assert_eq!(std::fs::read(at("out")).unwrap(), whole);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    // A source may be the destination, and may come twice.
    assert_eq!(ask(&["out", "out"], "out").status, 200);
    assert_eq!(
        std::fs::metadata(at("out")).unwrap().len(),
        2 * whole.len() as u64
    );
    assert_eq!(ask(&[], "out").status, 400);
    assert_eq!(daemon.call("POST", "/files/compose", &[], "{}").status, 400);
}

#[test]
fn metrics_and_environment_are_told() {
    let daemon = Daemon::start();
    let answer = daemon.call("GET", "/metrics", &[], "");
    let metrics: Value = serde_json::from_str(&answer.body).unwrap();
    let number = |name: &str| {
        metrics[name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name}: {metrics}"))
    };
    assert!(number("mem_used") > 0 && number("mem_used") < number("mem_total"));
    assert!(number("disk_used") > 0 && number("disk_used") <= number("disk_total"));
    assert!(number("cpu_count") > 0 && number("ts") > 1_700_000_000);
    assert!((0.0..=100.0).contains(&metrics["cpu_used_pct"].as_f64().unwrap()));
    let init = r#"{"envVars":{"A":"1"}}"#;
    assert_eq!(daemon.call("POST", "/init", &[], init).status, 204);
    assert_eq!(daemon.call("GET", "/envs", &[], "").body, r#"{"A":"1"}"#);
}
