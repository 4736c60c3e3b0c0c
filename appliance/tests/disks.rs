//! Disks of sandboxes by all three ways: copies here, reflinks on a file system made for it,
//! device-mapper in an emulated machine with Debian's kernel.

mod support;

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use appliance::config::{DiskBackend, DisksConfig};
use appliance::disks::{self, DiskError, Disks, Source};
use appliance::sys::device_mapper::DeviceMapper;
use appliance::sys::loop_device::{self, LoopDevice};
use snapshot_format::file_name::{ROOTFS, ROOTFS_COW};
use support::disk_scenarios::{
    MIB, clones_are_isolated, directory, disks_come_back_from_builds, hash, image, write,
};
use support::{machine, skip};

/// How long the machine may take for everything.
const MACHINE_LIMIT: Duration = Duration::from_secs(240);
/// Set in the machine.
const INSIDE: &str = "THAW_TEST_INSIDE";
/// Set for a process that shall die with its disks.
const VICTIM: &str = "THAW_TEST_VICTIM";
const IN_MACHINE: &str = "guest_device_mapper_disks_in_an_emulated_machine";

fn start(backend: DiskBackend, instance: &str, dir: &Path) -> Disks {
    let config = DisksConfig {
        backend,
        cow_mb: None,
        ..DisksConfig::default()
    };
    Disks::start(&config, instance, dir, &[]).unwrap()
}

#[test]
fn copied_disks_are_isolated_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let disks = start(DiskBackend::Copy, "diska", dir.path());
    assert_eq!(disks.backend(), "copy");
    assert!(
        disks.reason().contains("disks.backend"),
        "{}",
        disks.reason()
    );
    clones_are_isolated(&disks, dir.path());
    disks_come_back_from_builds(&disks, dir.path());
}

/// An XFS of a test's own, in a file; unmounted with it.
struct Xfs {
    dir: tempfile::TempDir,
    device: LoopDevice,
}

impl Xfs {
    fn mount() -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("mounting needs root".into());
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("xfs");
        File::create(&file).unwrap().set_len(1 << 30).unwrap();
        match Command::new("mkfs.xfs").arg("-q").arg(&file).output() {
            Err(error) => return Err(format!("no mkfs.xfs: {error}")),
            Ok(made) if !made.status.success() => {
                return Err(String::from_utf8_lossy(&made.stderr).into_owned());
            }
            Ok(_) => {}
        }
        let file = File::options().read(true).write(true).open(&file).unwrap();
        let device =
            LoopDevice::attach(&file, false).map_err(|e| format!("no loop device: {e}"))?;
        let xfs = Self { dir, device };
        fs::create_dir(xfs.path()).unwrap();
        let none: Option<&str> = None;
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some(&device.path()), &xfs.path(), Some("xfs"), flags, none)
            .map_err(|error| format!("no XFS in this kernel: {error}"))?;
        Ok(xfs)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.path(), nix::mount::MntFlags::MNT_DETACH);
        let _ = self.device.release();
    }
}

#[test]
fn reflinked_disks_are_isolated_and_come_back() {
    let xfs = match Xfs::mount() {
        Ok(xfs) => xfs,
        Err(reason) => return skip("reflinked_disks_are_isolated_and_come_back", &reason),
    };
    let dir = xfs.path();
    let disks = start(DiskBackend::Reflink, "diskb", &dir);
    assert_eq!(disks.backend(), "reflink");
    clones_are_isolated(&disks, &dir);
    disks_come_back_from_builds(&disks, &dir);

    // Found by trying, too, where there is no device-mapper.
    let auto = start(DiskBackend::Auto, "diskb", &dir);
    assert_ne!(auto.backend(), "copy", "{}", auto.reason());
}

#[test]
fn a_way_that_cannot_be_gone_is_refused_with_the_key_and_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let ask = |backend| {
        let config = DisksConfig {
            backend,
            cow_mb: None,
            ..DisksConfig::default()
        };
        Disks::start(&config, "diskc", dir.path(), &[])
    };
    for (backend, name) in [
        (DiskBackend::DeviceMapper, "device-mapper"),
        (DiskBackend::Reflink, "reflink"),
    ] {
        match ask(backend) {
            Ok(disks) => println!("this host can: {}", disks.reason()),
            Err(error) => {
                let error = error.to_string();
                assert!(
                    error.contains("disks.backend") && error.contains(name),
                    "{error}"
                );
            }
        }
    }
    let auto = ask(DiskBackend::Auto).unwrap();
    assert!(
        auto.reason().starts_with(auto.backend()),
        "{}",
        auto.reason()
    );
}

#[test]
fn guest_device_mapper_disks_in_an_emulated_machine() {
    if env::var_os(INSIDE).is_some() {
        return inside();
    }
    let inputs = env::var_os("THAW_INPUTS").map(PathBuf::from);
    if let Some(reason) = machine::missing(inputs.as_deref()) {
        return skip(IN_MACHINE, &reason);
    }
    let arguments = ["--exact", IN_MACHINE, "--nocapture"];
    let inputs = inputs.unwrap();
    let machine = machine::Machine::new(&inputs).set(INSIDE, "1");
    let (code, lines) = machine.run_self(&arguments, MACHINE_LIMIT);
    assert_eq!(code, 0, "in the machine");
    let done = lines
        .iter()
        .filter(|line| line.contains("scenario done:"))
        .count();
    assert_eq!(done, SCENARIOS.len(), "every scenario ran");
}

type Scenario = (&'static str, fn(&Path));

const SCENARIOS: [Scenario; 7] = [
    ("clones are isolated, and come back", isolated),
    ("bases are shared and let go", bases_are_shared),
    ("a full file", full),
    ("no room for a device", refused),
    ("a daemon dies", crash),
    ("what is nobody's goes", nobodys),
    ("other ways take over", other_ways),
];

/// All that only works where there is device-mapper.
fn inside() {
    let dir = Path::new("/data");
    if env::var_os(VICTIM).is_some() {
        die_with_disks(dir);
    }
    for (name, scenario) in SCENARIOS {
        let started = Instant::now();
        scenario(&directory(dir, "scenario"));
        fs::remove_dir_all(dir.join("scenario")).unwrap();
        assert_eq!(devices(), Vec::<String>::new(), "{name}");
        assert_eq!(loop_device::all().unwrap(), [], "{name}");
        println!(
            "scenario done: {name}, {:.1} s",
            started.elapsed().as_secs_f64()
        );
    }
}

fn devices() -> Vec<String> {
    DeviceMapper::open().unwrap().names().unwrap()
}

fn mapped(dir: &Path) -> Disks {
    start(DiskBackend::DeviceMapper, "inside", dir)
}

fn isolated(dir: &Path) {
    let disks = start(DiskBackend::Auto, "inside", dir);
    assert_eq!(disks.backend(), "device-mapper", "{}", disks.reason());
    println!("{}", disks.reason());
    clones_are_isolated(&disks, dir);
    disks_come_back_from_builds(&disks, dir);
}

fn whole(path: PathBuf) -> Source {
    Source::Image {
        path,
        size_mb: None,
    }
}

/// One read-only loop device for all disks of an image, gone with the last.
fn bases_are_shared(dir: &Path) {
    image(&dir.join("image"), 8 * MIB);
    let disks = mapped(dir);
    let make = |id: &str, source: &Source| disks.make(id, source, &directory(dir, id)).unwrap();
    let source = whole(dir.join("image"));
    let one = make("a", &source);
    make("b", &source);
    assert_eq!(
        loop_device::all().unwrap().len(),
        3,
        "one base, two files of changes"
    );
    // A build of a pause names the same base.
    write(&one, 5, b"changed");
    let build = directory(dir, "build");
    let kept = disks.keep("a", &build).unwrap();
    assert_eq!(kept.len(), 2);
    let again = make("c", &Source::Build(build));
    assert_eq!(hash(&again), hash(&one));
    assert_eq!(loop_device::all().unwrap().len(), 4);
    let bases = loop_device::all().unwrap();
    let direct = bases
        .iter()
        .filter(|(device, _)| device.is_direct())
        .count();
    assert_eq!(direct, 4, "all go around the page cache");
    for id in ["a", "b", "c"] {
        disks.remove(id);
    }
}

/// A file of changes that is full says so; what was written before is still there.
fn full(dir: &Path) {
    image(&dir.join("image"), 64 * MIB);
    let config = DisksConfig {
        backend: DiskBackend::DeviceMapper,
        cow_mb: Some(2),
        ..DisksConfig::default()
    };
    let disks = Disks::start(&config, "inside", dir, &[]).unwrap();
    let source = whole(dir.join("image"));
    let disk = disks
        .make("small", &source, &directory(dir, "small"))
        .unwrap();
    write(&disk, 10 * MIB, &[7; 4096]);
    assert_eq!(disks.usage("small").unwrap().limit_bytes, Some(2 * MIB));
    let file = File::options().write(true).open(&disk).unwrap();
    let written = (0..8u64).try_for_each(|n| {
        file.write_all_at(&vec![1; MIB as usize], n * MIB)?;
        file.sync_all()
    });
    drop(file);
    let error = written.unwrap_err();
    println!("a write says: {error}");
    assert!(disks.usage("small").unwrap().is_full);
    let error = disks
        .flatten("small", &directory(dir, "template"))
        .unwrap_err();
    assert!(
        matches!(error, DiskError::Full { limit_mb: 2, .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("disks.cow_mb"), "{error}");
    // Paused all the same; with a larger file it goes on, with what it had.
    disks.keep("small", &directory(dir, "build")).unwrap();
    disks.remove("small");
    drop(disks);
    let disks = mapped(dir);
    let source = Source::Build(dir.join("build"));
    let disk = disks
        .make("small", &source, &directory(dir, "resumed"))
        .unwrap();
    let mut kept = [0; 4096];
    File::open(&disk)
        .unwrap()
        .read_exact_at(&mut kept, 10 * MIB)
        .unwrap();
    assert_eq!(kept, [7; 4096]);
    for at in 0..8 {
        write(&disk, at * MIB, &vec![2; MIB as usize]);
    }
    assert!(!disks.usage("small").unwrap().is_full);
    disks.remove("small");
}

/// What can't be made leaves nothing, and says what it was.
fn refused(dir: &Path) {
    let disks = mapped(dir);
    File::create(dir.join("odd"))
        .unwrap()
        .set_len(1000)
        .unwrap();
    let error = disks.make("odd", &whole(dir.join("odd")), &directory(dir, "odd.d"));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("1000 bytes"), "{error}");
    image(&dir.join("image"), 4 * MIB);
    let source = whole(dir.join("image"));
    disks
        .make("twice", &source, &directory(dir, "first"))
        .unwrap();
    let error = disks
        .make("twice", &source, &directory(dir, "second"))
        .unwrap_err();
    assert!(error.to_string().contains("making its device"), "{error}");
    disks.remove("twice");
}

/// Another process makes disks and is killed: what it leaves is removed, and nothing of others.
fn crash(dir: &Path) {
    let others = directory(dir, "others");
    image(&others.join("image"), 4 * MIB);
    let other = start(DiskBackend::DeviceMapper, "insideb", &others);
    let source = whole(others.join("image"));
    let kept = other
        .make("kept", &source, &directory(&others, "kept"))
        .unwrap();
    write(&kept, 0, b"mine");

    let ours = directory(dir, "ours");
    let program = env::current_exe().unwrap();
    let mut victim = Command::new(program);
    victim
        .args(["--exact", IN_MACHINE, "--nocapture"])
        .env(VICTIM, "1");
    assert!(!victim.status().unwrap().success(), "it was killed");
    assert_eq!(devices().len(), 1 + 3, "three of its disks are there");

    // As the next daemon does it: one of them goes on with its guest, the files of the others are
    // there still, then they go.
    let lives = BTreeSet::from(["d1".to_owned()]);
    let left_over = |kept| disks::remove_left_over("inside", &ours, kept).unwrap();
    assert_eq!(left_over(&lives), 2 + 2);
    assert_eq!(left_over(&lives), 0);
    assert_eq!(devices(), ["thaw-inside-d1", "thaw-insideb-kept"]);
    let disks = mapped(&ours);
    let disk = disks.adopt("d1", &ours.join("d1")).unwrap();
    let mut found = [0; 9];
    let node = File::options().read(true).write(true).open(&disk).unwrap();
    node.read_exact_at(&mut found, MIB).unwrap();
    assert_eq!(&found, b"published");
    assert!(disks.usage("d1").unwrap().stored_bytes > 0);
    node.write_all_at(b"went on", 2 * MIB).unwrap();
    drop(node);
    disks.keep("d1", &directory(&ours, "went-on")).unwrap();
    // One more over the same base: they share its loop device.
    let source = Source::Build(ours.join("went-on"));
    disks.make("d3", &source, &directory(&ours, "d3")).unwrap();
    assert_eq!(loop_device::all().unwrap().len(), 2 + 3);
    disks.remove("d3");
    assert_eq!(loop_device::all().unwrap().len(), 2 + 2);
    disks.remove("d1");
    let disk = disks.make("d4", &source, &directory(&ours, "d4")).unwrap();
    let mut found = [0; 7];
    let node = File::open(&disk).unwrap();
    node.read_exact_at(&mut found, 2 * MIB).unwrap();
    assert_eq!(&found, b"went on");
    drop(node);
    disks.remove("d4");
    assert!(disks.adopt("d2", &ours.join("d2")).is_err(), "it is gone");

    assert_eq!(left_over(&BTreeSet::new()), 0);
    assert_eq!(devices(), ["thaw-insideb-kept"]);
    assert_eq!(loop_device::all().unwrap().len(), 2);
    // The build that it had published comes back.
    let source = Source::Build(ours.join("build"));
    let disk = disks
        .make("d0", &source, &directory(&ours, "back"))
        .unwrap();
    let mut found = [0; 9];
    File::open(&disk)
        .unwrap()
        .read_exact_at(&mut found, MIB)
        .unwrap();
    assert_eq!(&found, b"published");
    disks.remove("d0");
    other.remove("kept");
}

/// A daemon that runs takes apart what is nobody's, and leaves what others use.
fn nobodys(dir: &Path) {
    image(&dir.join("image"), 4 * MIB);
    let sandboxes = directory(dir, "sandboxes");
    let source = whole(dir.join("image"));
    let make = |disks: &Disks, id: &str| {
        // As a sandbox's place is made: nothing of an earlier time is in it.
        let _ = fs::remove_dir_all(sandboxes.join(id));
        let made = disks.make(id, &source, &directory(&sandboxes, id));
        made.unwrap()
    };
    let earlier = mapped(dir);
    for id in ["gone", "stuck", "again"] {
        make(&earlier, id);
    }
    // Its disks stay.
    drop(earlier);
    let disks = mapped(dir);
    let lives = make(&disks, "lives");
    write(&lives, 0, b"mine");
    // Of one that was being made.
    let half = directory(&sandboxes, "half").join(ROOTFS_COW);
    fs::write(&half, [0; 4096]).unwrap();
    let half = File::options().read(true).write(true).open(&half).unwrap();
    LoopDevice::attach(&half, false).unwrap();
    let owners = || {
        disks
            .owners(&sandboxes)
            .unwrap()
            .into_iter()
            .collect::<Vec<_>>()
    };
    assert_eq!(owners(), ["again", "gone", "half", "lives", "stuck"]);
    // Two bases, of this daemon's disks and of the earlier one's, and five files of changes.
    let loops = || loop_device::all().unwrap().len();
    assert_eq!(loops(), 2 + 5);

    for id in ["gone", "half"] {
        fs::remove_dir_all(sandboxes.join(id)).unwrap();
        disks.clear(id, &sandboxes).unwrap();
    }
    assert_eq!(owners(), ["again", "lives", "stuck"]);
    assert_eq!(loops(), 2 + 3, "the base that others are over is there");
    let mapper = DeviceMapper::open().unwrap();
    let (node, _) = mapper.table("thaw-inside-stuck").unwrap();
    let open = File::open(node).unwrap();
    let error = disks.clear("stuck", &sandboxes).unwrap_err();
    assert!(error.to_string().contains("removing its device"), "{error}");
    drop(open);
    disks.clear("stuck", &sandboxes).unwrap();
    // A sandbox whose last disk could not be taken apart gets one all the same.
    let again = make(&disks, "again");
    write(&again, 0, b"anew");
    assert_eq!(owners(), ["again", "lives"]);
    assert_eq!(loops(), 1 + 2);
    let mut found = [0; 4];
    File::open(&lives)
        .unwrap()
        .read_exact_at(&mut found, 0)
        .unwrap();
    assert_eq!(&found, b"mine");
    for id in ["again", "lives"] {
        disks.clear("nobody", &sandboxes).unwrap();
        disks.remove(id);
    }
}

/// The other process of [`crash`].
fn die_with_disks(dir: &Path) -> ! {
    let ours = dir.join("scenario/ours");
    image(&ours.join("image"), 4 * MIB);
    let disks = mapped(&ours);
    let source = whole(ours.join("image"));
    for number in 0..3 {
        let id = format!("d{number}");
        let disk = disks.make(&id, &source, &directory(&ours, &id)).unwrap();
        write(&disk, MIB, b"published");
    }
    disks.keep("d0", &directory(&ours, "build")).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL).unwrap();
    unreachable!("SIGKILL");
}

/// A disk of device-mapper's goes on as a copy, and that one under device-mapper again.
fn other_ways(dir: &Path) {
    image(&dir.join("image"), 8 * MIB);
    let (mapped, copied) = (mapped(dir), start(DiskBackend::Copy, "inside", dir));
    let source = whole(dir.join("image"));
    let disk = mapped.make("one", &source, &directory(dir, "one")).unwrap();
    write(&disk, 3 * MIB - 5, &[3; 70_000]);
    let written = hash(&disk);
    mapped.keep("one", &directory(dir, "first")).unwrap();
    mapped.remove("one");
    assert!(dir.join("first").join(ROOTFS_COW).exists());

    let source = Source::Build(dir.join("first"));
    let disk = copied.make("two", &source, &directory(dir, "two")).unwrap();
    assert_eq!(hash(&disk), written);
    copied.keep("two", &directory(dir, "second")).unwrap();
    copied.remove("two");
    assert!(dir.join("second").join(ROOTFS).exists());

    let source = Source::Build(dir.join("second"));
    let disk = mapped
        .make("three", &source, &directory(dir, "three"))
        .unwrap();
    assert_eq!(hash(&disk), written);
    mapped.remove("three");
}
