//! `thaw snapshot`: what a person sees of builds, without a daemon.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use snapshot_format::{
    Build, BuildId, BuildStore, PageCount, PageIndex, PageSize, PublishInfo, file_name,
};

const PAGES: u64 = 64;

fn thaw(arguments: &[&dyn AsRef<OsStr>]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_thaw"));
    command.arg("snapshot");
    command.args(arguments.iter().map(AsRef::as_ref));
    command.stdin(Stdio::null()).output().unwrap()
}

fn json(arguments: &[&dyn AsRef<OsStr>]) -> Value {
    let output = thaw(&[arguments, &[&"--json"]].concat());
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn stderr(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn publish(store: &BuildStore, number: u8, parent: Option<&Build>, pages: &[u64]) -> Build {
    let id = BuildId::from_bytes([number; 16]);
    let mut staging = store.stage(id).unwrap();
    let memory = PageCount::new(PAGES);
    let mut writer = staging
        .memory_writer(parent, PageSize::Size4K, memory)
        .unwrap();
    for page in pages {
        writer
            .pages(PageIndex::new(*page), &[number; 4096])
            .unwrap();
    }
    writer.finish().unwrap();
    fs::write(staging.file_path(file_name::VMSTATE), [number]).unwrap();
    staging.add_file(file_name::VMSTATE).unwrap();
    staging.publish(PublishInfo::default()).unwrap();
    store.open(&id).unwrap()
}

/// A base and two diffs; returns the directories of the first and the last.
fn chain(root: &Path) -> (BuildStore, PathBuf, PathBuf) {
    let store = BuildStore::open_or_create(&root.join("builds")).unwrap();
    let base = publish(&store, 1, None, &(0..32).collect::<Vec<_>>());
    let middle = publish(&store, 2, Some(&base), &[3, 4, 40]);
    let last = publish(&store, 3, Some(&middle), &[4]);
    (store, base.dir().to_owned(), last.dir().to_owned())
}

#[test]
fn inspect_counts_pages_and_what_a_chain_costs() {
    let root = tempfile::tempdir().unwrap();
    let (_, _, last) = chain(root.path());
    let found = json(&[&"inspect", &last]);
    assert_eq!(found["generation"], 2);
    assert_eq!(found["own_pages"], 1);
    assert_eq!(found["inherited_pages"], 32);
    assert_eq!(found["zero_pages"], 31);
    assert_eq!(found["live_bytes"], 33 * 4096);
    // Pages 3 and 4 of the base and page 4 of the diff between are dead.
    assert_eq!(found["stored_bytes"], 36 * 4096);
    let amplification = found["space_amplification"].as_f64().unwrap();
    assert!((amplification - 36.0 / 33.0).abs() < 1e-9, "{found}");
    assert!(found["merge"].is_null(), "{found}");
    let text = thaw(&[&"inspect", &last]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("1.09 times as much"), "{text}");
}

#[test]
fn diff_says_what_changed_and_its_status_whether_anything_did() {
    let root = tempfile::tempdir().unwrap();
    let (_, base, last) = chain(root.path());
    let found = json(&[&"diff", &base, &last]);
    assert_eq!(found["changed_pages"], 3);
    assert_eq!(found["became_content_pages"], 1);
    assert_eq!(found["changed_runs"][0]["start"], 3);
    assert_eq!(found["changed_runs"][0]["pages"], 2);
    assert_eq!(found["changed_files"][0], "vmstate");
    assert_eq!(thaw(&[&"diff", &base, &last]).status.code(), Some(1));
    assert_eq!(thaw(&[&"diff", &last, &last]).status.code(), Some(0));
}

#[test]
fn merged_build_has_the_same_memory_and_no_ancestors() {
    let root = tempfile::tempdir().unwrap();
    let (store, _, last) = chain(root.path());
    let report = json(&[&"merge", &last]);
    assert_eq!(report["builds_merged"], 3);
    assert_eq!(report["pages"], 33);
    let merged = report["dir"].as_str().unwrap();
    assert_eq!(thaw(&[&"diff", &last, &merged]).status.code(), Some(0));
    let found = json(&[&"inspect", &merged]);
    assert_eq!(found["generation"], 0);
    assert_eq!(found["builds"].as_array().unwrap().len(), 1);

    // Compressed, it can be looked at and merged back, but not served.
    let cold = json(&[&"merge", &last, &"--compress", &"zstd"]);
    let cold: BuildId = cold["build"].as_str().unwrap().parse().unwrap();
    assert!(store.open(&cold).is_err());
    let dir = store.path(&cold);
    assert_eq!(thaw(&[&"diff", &last, &dir]).status.code(), Some(0));
    assert!(thaw(&[&"verify", &dir]).status.success());
    let warm = json(&[
        &"merge",
        &dir,
        &"--into",
        &"000000000000000000000000000000aa",
    ]);
    assert_eq!(warm["build"], "000000000000000000000000000000aa");
    store
        .open(&warm["build"].as_str().unwrap().parse().unwrap())
        .unwrap();
    assert_eq!(store.leftovers().unwrap(), Vec::<PathBuf>::new());

    let again = thaw(&[
        &"merge",
        &last,
        &"--into",
        &"000000000000000000000000000000aa",
    ]);
    assert!(
        stderr(&again).contains("000000000000000000000000000000aa"),
        "{again:?}"
    );
    let nonsense = thaw(&[&"merge", &last, &"--into", &"xyz"]);
    assert!(stderr(&nonsense).contains("--into"), "{nonsense:?}");
}

#[test]
fn exported_chain_can_be_imported_elsewhere() {
    let root = tempfile::tempdir().unwrap();
    let (_, _, last) = chain(root.path());
    let (stream, other) = (root.path().join("stream.tar"), root.path().join("other"));
    let exported = thaw(&[&"export", &last, &"--output", &stream]);
    assert!(exported.status.success(), "{exported:?}");
    let report = json(&[&"import", &other, &"--input", &stream]);
    assert_eq!(report["published"].as_array().unwrap().len(), 3);
    let imported = report["dir"].as_str().unwrap();
    assert_eq!(thaw(&[&"diff", &last, &imported]).status.code(), Some(0));
    assert!(
        thaw(&[&"verify", &imported, &"--ancestors"])
            .status
            .success()
    );
    let again = json(&[&"import", &other, &"--input", &stream]);
    assert_eq!(again["present"].as_array().unwrap().len(), 3);

    // What is there is not replaced, and a stream that is cut short leaves nothing.
    let refused = thaw(&[&"export", &last, &"--output", &stream]);
    assert!(stderr(&refused).contains("stream.tar"), "{refused:?}");
    let length = fs::metadata(&stream).unwrap().len();
    fs::File::options()
        .write(true)
        .open(&stream)
        .unwrap()
        .set_len(length / 2)
        .unwrap();
    let third = root.path().join("third");
    let cut = thaw(&[&"import", &third, &"--input", &stream]);
    stderr(&cut);
    let store = BuildStore::open_or_create(&third).unwrap();
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(store.leftovers().unwrap(), Vec::<PathBuf>::new());
}

#[test]
fn export_and_import_work_in_a_pipe() {
    let root = tempfile::tempdir().unwrap();
    let (_, _, last) = chain(root.path());
    let exported = thaw(&[&"export", &last]);
    assert!(exported.status.success(), "{exported:?}");
    let stream = root.path().join("stream.tar");
    fs::write(&stream, exported.stdout).unwrap();
    let other = root.path().join("other");
    let mut command = Command::new(env!("CARGO_BIN_EXE_thaw"));
    command.args(["snapshot", "import"]).arg(&other);
    let imported = command
        .stdin(fs::File::open(&stream).unwrap())
        .output()
        .unwrap();
    assert!(imported.status.success(), "{imported:?}");
    let dir = other.join(last.file_name().unwrap());
    assert_eq!(thaw(&[&"diff", &last, &dir]).status.code(), Some(0));
}

#[test]
fn what_is_no_build_is_refused_by_its_path() {
    let root = tempfile::tempdir().unwrap();
    for command in ["inspect", "verify", "merge", "export"] {
        let output = thaw(&[&command, &root.path()]);
        assert!(stderr(&output).contains("is no build"), "{output:?}");
    }
    let missing = root.path().join("missing");
    let output = thaw(&[&"import", &root.path(), &"--input", &missing]);
    assert!(stderr(&output).contains("missing"), "{output:?}");
}
