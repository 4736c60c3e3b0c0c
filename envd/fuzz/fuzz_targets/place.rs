//! Listings while the tree changes: whatever links and directories are put in the way, nothing from
//! outside of the listed directory is ever entered or told of.
//!
//! The input is a program of small changes (make, link, rename, remove) to a tree; after each, the
//! tree is listed to its depth and every entry has to be one that is really in it.

#![no_main]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use envd::fuzzing::{list, remove};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// In memory, if there is such a place.
static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let root = parent.join(format!("envd-fuzz-{}", std::process::id()));
    fs::create_dir_all(root.join("outside/secret")).expect("a directory");
    fs::write(root.join("outside/file"), b"outside").expect("a file");
    root
});

fn at(tree: &Path, code: u8) -> PathBuf {
    let name = |bits: u8| NAMES[usize::from(bits & 3)];
    match code >> 6 {
        0 => tree.join(name(code)),
        1 => tree.join(name(code)).join(name(code >> 2)),
        _ => tree.join(name(code)).join(name(code >> 2)).join(name(code >> 4)),
    }
}

fn change(tree: &Path, operation: u8, one: u8, other: u8) {
    let (from, to) = (at(tree, one), at(tree, other));
    // Most changes are impossible at most times, which is fine.
    let _ = match operation % 6 {
        0 => fs::create_dir(&from),
        1 => fs::write(&from, b"x"),
        2 => symlink(ROOT.join("outside"), &from),
        3 => symlink(&to, &from),
        4 => fs::rename(&from, &to),
        _ => {
            let inside = tree.to_str().and_then(|tree| from.to_str()?.strip_prefix(tree));
            assert!(inside.is_some());
            remove(from.to_str().expect("ours is UTF-8"));
            Ok(())
        }
    };
}

fuzz_target!(|program: Vec<(u8, u8, u8)>| {
    let tree = ROOT.join("tree");
    let _ = fs::remove_dir_all(&tree);
    fs::create_dir(&tree).expect("the tree");
    let text = tree.to_str().expect("ours is UTF-8");
    for (operation, one, other) in program.into_iter().take(24) {
        change(&tree, operation, one, other);
        for path in list(text, 8).expect("the tree can be listed") {
            let relative = path.strip_prefix(text).expect("it is below the tree");
            assert!(!relative.contains("secret") && !relative.contains("file"), "{path}");
            assert!(fs::symlink_metadata(&path).is_ok(), "{path}");
        }
        assert!(ROOT.join("outside/secret").is_dir() && ROOT.join("outside/file").is_file());
    }
});
