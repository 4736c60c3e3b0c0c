//! A daemon and its engines that die at once, over fakes: what was restored runs on under the next
//! daemon with every byte of its memory, or has failed with a reason, and nothing of it is left.

mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use support::daemon::Daemon;
use support::fake::each::needs_fakes;
use support::fake::subject::{self, Inside, Subject};
use support::fake::{self, Kind, Vmm};
use support::place::Place;
use support::procs;
use support::skip;
use uffd_engine::sys::state_map::holds_files;

/// The test that a fake's process runs as.
const PLAYER: &str = "a_fake_plays";

#[test]
fn a_fake_plays() {
    fake::run_if_wanted();
}

/// Everything but VMMs dies, something happens, and the next daemon is there.
fn crash_all(subject: Subject, meanwhile: impl FnOnce(&Place)) -> Subject {
    let Subject {
        place,
        fake,
        daemon,
    } = subject;
    daemon.kill_with_engines(&place);
    meanwhile(&place);
    Subject {
        daemon: Daemon::start(&place),
        place,
        fake,
    }
}

/// What became of a sandbox, and why: from the start on it is said to run.
fn state_of(subject: &Subject, id: &str) -> (String, String) {
    let api = &subject.daemon.api;
    // Its owner answers when it has it.
    api.get(&format!("/v1/sandboxes/{id}/console")).expect(200);
    let sandbox = api.sandbox(id).expect(200);
    let text = |key: &str| sandbox[key].as_str().unwrap_or_default().to_owned();
    (text("state"), text("reason"))
}

#[track_caller]
fn assert_runs(subject: &Subject, id: &str) {
    assert_eq!(state_of(subject, id), ("running".into(), String::new()));
}

/// Pauses it and brings it back: its memory comes as it is touched.
fn again(subject: &Subject, id: &str) -> Value {
    subject.daemon.api.pause(id).expect(200);
    subject.daemon.api.resume(id).expect(200)
}

/// Touches all of a guest's memory while the test goes on.
fn hashing(sandbox: &Value) -> JoinHandle<Value> {
    let inside = Inside::of(sandbox);
    spawn(move || inside.hash())
}

/// A tmpfs of a few pages.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, bytes: u64) -> Result<Self, String> {
        let (kind, options) = (Some("tmpfs"), format!("size={bytes}"));
        let flags = MsFlags::empty();
        mount(kind, &at, kind, flags, Some(&*options))
            .map_err(|error| format!("a tmpfs can't be mounted: {error}"))?;
        Ok(Self(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn dir(place: &Place, id: &str) -> PathBuf {
    place.run.join("sandboxes").join(id)
}

#[test]
fn a_guest_outlives_its_daemon_and_its_engine_at_once() {
    needs_fakes!("a_guest_outlives_its_daemon_and_its_engine_at_once");
    outlive("tkeepa", 310, |_| {});
}

#[test]
fn a_guest_whose_memory_is_being_loaded_outlives_both() {
    needs_fakes!("a_guest_whose_memory_is_being_loaded_outlives_both");
    outlive("tkeepb", 311, |place| {
        place.reconfigure(&[("[engine]\n", "[engine]\nload_mib_per_s = 2\n")]);
    });
}

#[test]
fn a_guest_whose_writes_nobody_notices_outlives_both() {
    needs_fakes!("a_guest_whose_writes_nobody_notices_outlives_both");
    outlive("tkeepc", 312, |place| {
        let checked = "[engine]\ncheck_writes = true\n";
        let without = "[engine]\ntrack_writes = false\nworking_sets = false\n";
        place.reconfigure(&[(checked, without)]);
    });
}

fn outlive(instance: &str, pool: u16, configure: impl FnOnce(&Place)) {
    let place = subject::place(instance, pool, Vmm::Firecracker);
    configure(&place);
    let mut subject = Subject::start_in(place, Kind::FIRECRACKER, PLAYER);
    let api = subject.daemon.api.clone();
    let made = ["booted", "restored"].map(|id| api.create(id, "base"));
    let insides = made.each_ref().map(Inside::of);
    for (number, inside) in (1..).zip(&insides) {
        inside.fill(64, 256, number);
        inside.fill(1000, 9000, number);
    }
    let mut restored = again(&subject, "restored");
    let vmm = |subject: &Subject, id: &str| procs::vmm(&subject.place, id).expect("a VMM").pid;
    for round in 0..3 {
        let hashes = insides[0].hash();
        let pids = ["booted", "restored"].map(|id| vmm(&subject, id));
        // Written, never there before, and given back: of a page of its own, of one that is the build's,
        // and of one that was zero.
        insides[1].fill(12_000, 8, 7 + round);
        insides[1].give_back(12_004, 4);
        insides[1].give_back(1000 + 8 * round, 8);
        insides[1].give_back(14_000, 4);
        // Again and again while it goes through all of its memory, from when nobody serves it on.
        let mut whole = None;
        for crash in 0..3 {
            sleep(Duration::from_millis(20 * crash));
            let counts = insides[0].count();
            let mut giving_back = None;
            subject = crash_all(subject, |place| {
                assert!(procs::engine(place).is_none(), "an engine lives");
                insides[0].runs_on_from(counts);
                let inside = Inside::of(&restored);
                let first = 9000 + 100 * round + 10 * crash;
                let giving = spawn(move || inside.give_back(first, 10));
                let whole = whole.get_or_insert_with(|| hashing(&restored));
                // The kernel has both wait until somebody is there.
                sleep(Duration::from_millis(20));
                assert!(crash > 0 || !whole.is_finished(), "nobody served it");
                assert!(!giving.is_finished(), "nobody was told");
                giving_back = Some(giving);
            });
            giving_back.unwrap().join().unwrap();
            for (id, pid) in ["booted", "restored"].into_iter().zip(pids) {
                assert_runs(&subject, id);
                assert_eq!(vmm(&subject, id), pid, "{id}");
            }
        }
        whole.unwrap().join().unwrap();
        let now = api.sandbox("restored").expect(200);
        for field in ["execution_id", "address", "started_at_ms"] {
            assert_eq!(now[field], restored[field], "{field}");
        }
        assert_eq!(insides[0].hash(), hashes);

        // What it should be by now, in a guest that nobody served.
        let twin = Inside::of(&api.create("twin", "base"));
        twin.fill(64, 256, 2);
        twin.fill(1000, 9000, 2);
        for round in 0..=round {
            twin.fill(12_000, 8, 7 + round);
            twin.give_back(12_004, 4);
            twin.give_back(1000 + 8 * round, 8);
            for crash in 0..3 {
                twin.give_back(9000 + 100 * round + 10 * crash, 10);
            }
        }
        let right = twin.hash();
        api.destroy("twin");
        assert_eq!(insides[1].hash(), right, "round {round}");
        // And it is when it comes back: what was written was noticed.
        again(&subject, "restored");
        assert_eq!(insides[1].hash(), right, "round {round}, from disk");
        restored = again(&subject, "restored");
    }
    again(&subject, "booted");
    assert_runs(&subject, "booted");
    subject.end();
}

/// What is done to a table, and what is said of it then.
type Damage<'a> = (&'a str, &'a dyn Fn(&Path));

/// A guest that was restored, and what its hash should be.
fn restored_one(subject: &Subject) -> (Value, Value) {
    let made = subject.daemon.api.create("one", "base");
    let inside = Inside::of(&made);
    inside.fill(64, 4000, 5);
    let hash = inside.hash();
    (again(subject, "one"), hash)
}

#[track_caller]
fn assert_lost(subject: &Subject, why: &str) {
    let (state, reason) = state_of(subject, "one");
    assert_eq!(state, "failed");
    assert!(reason.contains(why), "{reason}");
    assert!(reason.contains("can't be taken over"), "{reason}");
    assert_eq!(subject.place.sandbox_leftovers(), Vec::<String>::new());
    subject.daemon.api.destroy("one");
}

#[test]
fn a_guest_of_which_something_is_lost_has_failed_and_leaves_nothing() {
    needs_fakes!("a_guest_of_which_something_is_lost_has_failed_and_leaves_nothing");
    let mut subject = Subject::start("tkeepd", 313, Kind::FIRECRACKER, PLAYER);
    let pages = |place: &Place| dir(place, "one").join("pages");
    let damage: [Damage; 5] = [
        ("are not at", &|path| fs::remove_file(path).unwrap()),
        ("another size than the memory", &|path| {
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(100)
                .unwrap();
        }),
        ("another size than the memory", &|path| {
            let file = File::options().write(true).open(path).unwrap();
            file.set_len(1 << 20).unwrap();
        }),
        ("nor a file of our own", &|path| {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
            fs::set_permissions(path, mode).unwrap();
        }),
        ("can't be used", &|path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
    ];
    for (why, damage) in damage {
        restored_one(&subject);
        subject = crash_all(subject, |place| damage(&pages(place)));
        assert_lost(&subject, why);
    }

    // Somebody, an engine that is stuck, say, has it still.
    restored_one(&subject);
    let mut held = None;
    subject = crash_all(subject, |place| {
        let file = File::open(pages(place)).unwrap();
        file.try_lock().unwrap();
        held = Some(file);
    });
    drop(held);
    assert_lost(&subject, "did not surrender it");

    // Its daemon was of a version that wrote down less.
    restored_one(&subject);
    subject = crash_all(subject, |place| {
        let path = dir(place, "one").join("running.json");
        let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert!(record.as_object_mut().unwrap().remove("will").is_some());
        fs::write(&path, record.to_string()).unwrap();
    });
    assert_lost(&subject, "did not write down where that is");

    // The build whose memory it is.
    let (sandbox, _) = restored_one(&subject);
    subject = crash_all(subject, |place| {
        let build = place.build(sandbox["build"].as_str().unwrap());
        fs::rename(build.join("memory.map"), build.join("away")).unwrap();
    });
    support::wait_for("it has failed", Duration::from_secs(20), || {
        let (state, reason) = state_of(&subject, "one");
        (state == "failed" && reason.contains("memory.map")).then_some(())
    });
    subject.end();
}

#[test]
fn a_run_directory_on_disk_is_told_of_and_costs_guests_when_both_die() {
    const NAME: &str = "a_run_directory_on_disk_is_told_of_and_costs_guests_when_both_die";
    needs_fakes!(NAME);
    let on_disk = Path::new("/var/tmp");
    if holds_files(on_disk).unwrap_or(true) {
        return skip(NAME, "/var/tmp is in memory");
    }
    let mut place = subject::place("tkeepe", 314, Vmm::Firecracker);
    let quoted = |path: &Path| format!("run_dir = \"{}\"", path.display());
    let (before, now) = (quoted(&place.run), on_disk.join("tkeepe"));
    let _ = fs::remove_dir_all(&now);
    place.reconfigure(&[(&before, &quoted(&now))]);
    place.run = now;
    let mut subject = Subject::start_in(place, Kind::FIRECRACKER, PLAYER);
    let told = |subject: &Subject| {
        let log = fs::read_to_string(&subject.place.log).unwrap();
        log.matches("run_dir is on no tmpfs").count()
    };
    assert_eq!(told(&subject), 1);
    let (sandbox, hash) = restored_one(&subject);
    assert!(!dir(&subject.place, "one").join("pages").exists());
    // One of them may die.
    subject = subject.crash(|_, _| {});
    assert_runs(&subject, "one");
    assert_eq!(Inside::of(&sandbox).hash(), hash);
    assert_eq!(told(&subject), 2);
    subject = crash_all(subject, |_| {});
    assert_lost(&subject, "where run_dir is on a tmpfs");
    subject.end();
}

#[test]
fn a_tmpfs_without_room_for_a_table_costs_no_restore() {
    const NAME: &str = "a_tmpfs_without_room_for_a_table_costs_no_restore";
    needs_fakes!(NAME);
    let place = subject::place("tkeepf", 315, Vmm::Firecracker);
    let mut subject = Subject::start_in(place, Kind::FIRECRACKER, PLAYER);
    let api = subject.daemon.api.clone();
    let inside = Inside::of(&api.create("one", "base"));
    inside.fill(64, 4000, 5);
    let hash = inside.hash();
    api.pause("one").expect(200);
    // Less than a table takes.
    let small = match Small::mount(subject.place.run.join("sandboxes"), 12 << 10) {
        Ok(small) => small,
        Err(reason) => return skip(NAME, &reason),
    };
    api.resume("one").expect(200);
    assert!(!dir(&subject.place, "one").join("pages").exists());
    assert_eq!(inside.hash(), hash);
    subject = subject.crash(|_, _| {});
    assert_runs(&subject, "one");
    api.pause("one").expect(200);
    drop(small);
    api.resume("one").expect(200);
    assert_eq!(inside.hash(), hash);
    subject.end();
}

#[test]
fn a_guest_that_asked_for_its_memory_lives_on_if_it_has_all_of_it() {
    needs_fakes!("a_guest_that_asked_for_its_memory_lives_on_if_it_has_all_of_it");
    let mut subject = Subject::start("tkeepg", 316, Kind::CLOUD_HYPERVISOR, PLAYER);
    let (sandbox, hash) = restored_one(&subject);
    let inside = Inside::of(&sandbox);
    subject.has_all_of("one");
    for _ in 0..2 {
        subject = crash_all(subject, |_| {});
        assert_runs(&subject, "one");
        assert_eq!(inside.hash(), hash);
    }
    inside.fill(9000, 8, 6);
    inside.give_back(64, 8);
    let hash = inside.hash();
    again(&subject, "one");
    assert_eq!(inside.hash(), hash);
    subject.has_all_of("one");
    again(&subject, "one");
    assert_eq!(inside.hash(), hash);
    subject.end();
}

#[test]
fn a_guest_that_asks_for_its_memory_is_lost_with_whom_it_asks() {
    needs_fakes!("a_guest_that_asks_for_its_memory_is_lost_with_whom_it_asks");
    let mut subject = Subject::start("tkeeph", 317, Kind::CLOUD_HYPERVISOR, PLAYER);
    restored_one(&subject);
    subject = crash_all(subject, |_| {});
    let (state, reason) = state_of(&subject, "one");
    // It ends by itself when nobody answers, and may have had all of it before.
    println!("{state}: {reason}");
    if state == "failed" {
        let asked = reason.contains("asked for pages on a connection that ended");
        assert!(asked || reason.contains("VMM"), "{reason}");
        assert_eq!(subject.place.sandbox_leftovers(), Vec::<String>::new());
    }
    subject.end();
}
