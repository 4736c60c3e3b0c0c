//! What must hold for disks whichever way they are made.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use appliance::disks::{Disks, Source};
use snapshot_format::file_name::ROOTFS;

pub(crate) const MIB: u64 = 1 << 20;

/// A directory below `dir`.
pub(crate) fn directory(dir: &Path, name: &str) -> PathBuf {
    let made = dir.join(name);
    fs::create_dir_all(&made).unwrap();
    made
}

/// An image with data at its begin, in its middle and at its end, and holes between.
pub(crate) fn image(path: &Path, bytes: u64) {
    let file = File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    for (number, at) in [0, bytes / 2, bytes - MIB].into_iter().enumerate() {
        let content: Vec<u8> = (0..MIB).map(|n| (n / 5) as u8 ^ number as u8).collect();
        file.write_all_at(&content, at).unwrap();
    }
}

/// A checksum of all that can be read of a disk.
pub(crate) fn hash(path: &Path) -> u32 {
    let file = File::open(path).unwrap();
    let (mut crc, mut at, mut buffer) = (0, 0, vec![0; MIB as usize]);
    loop {
        match file.read_at(&mut buffer, at).unwrap() {
            0 => return crc,
            read => crc = crc32c::crc32c_append(crc, &buffer[..read]),
        }
        at += MIB;
    }
}

pub(crate) fn write(path: &Path, at: u64, content: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(content, at).unwrap();
    file.sync_all().unwrap();
}

/// Ten disks of one image, each written to in other places: no write shows anywhere else.
pub(crate) fn clones_are_isolated(disks: &Disks, dir: &Path) {
    let (original, bytes) = (dir.join("image"), 4 * MIB);
    image(&original, bytes);
    let before = hash(&original);
    let source = Source::Image {
        path: original.clone(),
        size_mb: None,
    };
    let clones: Vec<(String, PathBuf)> = (0..10)
        .map(|number| {
            let id = format!("clone{number}");
            let made = disks.make(&id, &source, &directory(dir, &id)).unwrap();
            (id, made)
        })
        .collect();
    assert!(clones.iter().all(|(_, disk)| hash(disk) == before));
    let mut expected = vec![before; clones.len()];
    for (number, (_, disk)) in clones.iter().enumerate() {
        // Over data, over a hole, in one place that all write to, and not along any block.
        let mark = format!("written by {number}").repeat(1000);
        for at in [4000, bytes / 4 + number as u64 * 9001, bytes - 70_000] {
            write(disk, at, mark.as_bytes());
        }
        expected[number] = hash(disk);
        for (other, (_, disk)) in clones.iter().enumerate() {
            assert_eq!(
                hash(disk),
                expected[other],
                "{other}, after {number} was written"
            );
        }
    }
    expected.sort_unstable();
    expected.dedup();
    assert_eq!(expected.len(), clones.len(), "all differ from each other");
    assert_eq!(hash(&original), before, "the template's image");
    for (id, _) in &clones {
        let usage = disks.usage(id).unwrap();
        assert_eq!(usage.size_bytes, bytes);
        assert!(!usage.is_full && usage.stored_bytes > 0, "{usage:?}");
        disks.remove(id);
        fs::remove_dir_all(dir.join(id)).unwrap();
    }
    assert!(disks.usage("clone0").is_err(), "it is gone");
}

/// A disk goes through a pause, a resume and a template, and is what it was each time. The build
/// of the pause stays as it was, whatever is written after the resume.
pub(crate) fn disks_come_back_from_builds(disks: &Disks, dir: &Path) {
    let original = dir.join("image");
    image(&original, 16 * MIB);
    let source = Source::Image {
        path: original.clone(),
        size_mb: None,
    };
    let disk = disks.make("one", &source, &directory(dir, "one")).unwrap();
    write(&disk, 3 * MIB + 77, &[0xa5; 50_000]);
    let paused = hash(&disk);
    let build = directory(dir, "paused");
    disks.keep("one", &build).unwrap();
    disks.remove("one");
    fs::remove_dir_all(dir.join("one")).unwrap();

    let source = Source::Build(build);
    for round in 0..2 {
        let disk = disks.make("one", &source, &directory(dir, "one")).unwrap();
        assert_eq!(hash(&disk), paused, "resume {round}");
        write(&disk, 9 * MIB, &[round + 1; 9000]);
        assert_ne!(hash(&disk), paused);
        disks.remove("one");
        fs::remove_dir_all(dir.join("one")).unwrap();
    }

    let disk = disks.make("one", &source, &directory(dir, "one")).unwrap();
    write(&disk, 5 * MIB - 1, &[0x5a; 4098]);
    let template = directory(dir, "template");
    let kept = disks.flatten("one", &template).unwrap();
    assert_eq!(kept.len(), 1);
    assert_eq!(
        hash(&template.join(ROOTFS)),
        hash(&disk),
        "flattened, it is equal"
    );
    let written = hash(&disk);
    write(&disk, 0, b"it goes on");
    assert_eq!(hash(&template.join(ROOTFS)), written, "and a copy");
    disks.remove("one");
    let clone = disks
        .make("two", &Source::Build(template), &directory(dir, "two"))
        .unwrap();
    assert_eq!(hash(&clone), written);
    disks.remove("two");
    for name in ["one", "two", "paused", "template"] {
        fs::remove_dir_all(dir.join(name)).unwrap();
    }
}
