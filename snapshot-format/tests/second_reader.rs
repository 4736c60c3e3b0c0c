//! The reader in `reader.py`, written from FORMAT.md alone, against the Rust one.
//!
//! Where they disagree, the specification is wrong or one of them is.

mod support;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Output};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use sha2::{Digest, Sha256};
use snapshot_format::{
    Build, BuildId, BuildStore, Encoding, MergeOptions, WorkingSet, WorkingSetFile,
};
use support::chain::{mixed_chain, publish_chain};
use support::{PAGE, at, count, id, info, small_chain, temp_store};

fn read_in_python(root: &Path, build: BuildId) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader.py");
    let mut command = Command::new("python3");
    command.arg(script).arg(root).arg(build.to_string());
    command.output().expect("python3 was there a moment ago")
}

/// Whether there is a Python; says by name that the test is skipped if not.
fn has_python(test: &str) -> bool {
    let found = Command::new("python3").arg("--version").output().is_ok();
    if !found {
        println!("skipped: {test}: python3 is not installed");
    }
    found
}

/// What `reader.py` has to print for a build.
fn in_rust(build: &Build) -> String {
    let map = build.map();
    let mut lines = vec![format!(
        "build {} generation {} pages {} page-size {}",
        build.id(),
        map.generation(),
        map.memory_pages(),
        map.page_size().bytes()
    )];
    if let WorkingSetFile::Present(set) = build.working_set() {
        let runs = set.runs().iter();
        let pages = runs.flat_map(|run| (0..run.pages.get()).map(|page| run.start.get() + page));
        let pages: String = pages.map(|page| format!(" {page}")).collect();
        lines.push(format!("working-set{pages}"));
    }
    let mut content = [0; PAGE];
    for page in 0..map.memory_pages().get() {
        build.read_page(at(page), &mut content).unwrap();
        let digest = Sha256::digest(content);
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        lines.push(format!("{page} {hex}"));
    }
    lines.join("\n") + "\n"
}

fn assert_same(store: &BuildStore, build: &Build) {
    let output = read_in_python(store.root(), build.id());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), in_rust(build));
}

#[test]
fn second_reader_reads_random_chains_alike() {
    if !has_python("second_reader_reads_random_chains_alike") {
        return;
    }
    let config = ProptestConfig {
        cases: 12,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let result = TestRunner::new(config).run(&mixed_chain(), |chain| {
        let (_dir, store) = temp_store();
        let (last, _) = publish_chain(&store, &chain);
        assert_same(&store, &last);
        let options = MergeOptions {
            encoding: Encoding::Lz4,
            ..MergeOptions::default()
        };
        let mut go_on = |_| ControlFlow::Continue(());
        store
            .merge(&last, id(100), info(), &options, &mut go_on)
            .unwrap();
        assert_same(&store, &store.open_cold(&id(100)).unwrap());
        Ok(())
    });
    result.unwrap();
}

#[test]
fn second_reader_reads_the_golden_files() {
    if !has_python("second_reader_reads_the_golden_files") {
        return;
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    let store = BuildStore::open_or_create(&golden).unwrap();
    for number in [1, 2] {
        assert_same(&store, &store.open(&id(number)).unwrap());
    }
}

#[test]
fn second_reader_refuses_a_flipped_bit_in_every_file() {
    if !has_python("second_reader_refuses_a_flipped_bit_in_every_file") {
        return;
    }
    let (_dir, store) = temp_store();
    let (_, diff) = small_chain(&store);
    let touches = [7, 0, 1, 2, 5, 4].map(at);
    let set = WorkingSet::record(diff.map(), touches, count(100));
    store.write_working_set(&diff, &set).unwrap();
    assert_same(&store, &diff);
    for name in fs::read_dir(diff.dir()).unwrap() {
        let path = name.unwrap().path();
        let good = fs::read(&path).unwrap();
        for part in 0..8 {
            let mut bad = good.clone();
            bad[(good.len() - 1) * part / 7] ^= 1 << part;
            fs::write(&path, bad).unwrap();
            let output = read_in_python(store.root(), diff.id());
            let place = format!("{} part {part}", path.display());
            assert_eq!(output.status.code(), Some(1), "{place}");
            assert!(output.stdout.is_empty(), "{place}");
        }
        fs::write(&path, good).unwrap();
    }
    assert_same(&store, &diff);
}
