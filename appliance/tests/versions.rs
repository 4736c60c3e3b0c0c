//! Two versions of a real VMM on one host, as `THAW_FIRECRACKER` and `THAW_FIRECRACKER_OLD` (or
//! `THAW_CLOUD_HYPERVISOR` and `THAW_CLOUD_HYPERVISOR_OLD`) name them: what the old one made goes on
//! in the old one after the new one was put first, and in no other.
//!
//! The guests are those of `support/adder`, which say whether every byte of them is right.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::adder::{self, Written, run, written};
use support::daemon::Daemon;
use support::place::{Place, quoted};
use support::stand_in::{self, StandIns};
use support::{needs, procs, skip};

/// The test that a stand-in's process runs as.
const STAND_IN: &str = "something_answers_for_guests_here";

/// A kind of VMM, and what of it is configured.
struct Subject {
    place: Place,
    old: PathBuf,
    new: PathBuf,
    /// The key of its programs.
    programs: &'static str,
}

impl Subject {
    fn new(driver: &str, instance: &str, pool: u16, pair: [PathBuf; 2], elf: &[u8]) -> Self {
        let programs = match driver {
            "firecracker" => "firecracker",
            _ => "cloud_hypervisor",
        };
        let vmm = format!("driver = \"{driver}\"\n{programs} = []\n");
        let place = Place::with_template(instance, pool, &vmm, elf, 64);
        let [old, new] = pair;
        Self {
            place,
            old,
            new,
            programs,
        }
    }

    /// A daemon that has these, in this order.
    fn start(&self, programs: &[&Path]) -> Daemon {
        let begin = format!("{} = [", self.programs);
        let text = fs::read_to_string(&self.place.config).unwrap();
        let line = text.lines().find(|line| line.starts_with(&begin)).unwrap();
        let programs: Vec<String> = programs.iter().map(|program| quoted(program)).collect();
        let list = format!("{begin}{}]", programs.join(", "));
        self.place.reconfigure(&[(line, &list)]);
        Daemon::start(&self.place)
    }

    /// What a paused sandbox says of where it was made.
    fn made_by(&self, paused: &Value) -> Value {
        let build = self.place.build(paused["build"].as_str().unwrap());
        let manifest = fs::read(build.join("manifest.json")).unwrap();
        serde_json::from_slice::<Value>(&manifest).unwrap()["vmm"].clone()
    }

    /// Pauses one that has gone on since `before`, in the VMM of that version.
    fn pause(&self, daemon: &Daemon, id: &str, before: Written, version: &Value) -> Written {
        run();
        let paused = daemon.api.pause(id).expect(200);
        let now = written(&self.place, &paused);
        now.follows(before, id);
        assert_eq!(self.made_by(&paused)["version"], *version, "{id}");
        now
    }

    /// The program that runs a sandbox; a script may have started it.
    fn program_of(&self, id: &str) -> PathBuf {
        let vmm = procs::vmm(&self.place, id).expect("a VMM");
        fs::read_link(format!("/proc/{}/exe", vmm.pid)).unwrap()
    }

    fn builds_stay_with_their_makers(&self) {
        let stand_ins = StandIns::watch(&self.place.instance, STAND_IN);
        let version = |daemon: &Daemon| {
            let vmm = daemon.api.get("/v1/host").expect(200)["vmm"].clone();
            println!("{vmm}");
            vmm["version"].clone()
        };
        let daemon = self.start(&[&self.old]);
        let old = version(&daemon);
        daemon.api.create("one", "base");
        let before = self.pause(&daemon, "one", Written::default(), &old);
        daemon.api.resume("one").expect(200);
        daemon.api.snapshot("one", "warm").expect(201);
        let before = self.pause(&daemon, "one", before, &old);
        daemon.stop();

        // The new one alone can't, and says so.
        let daemon = self.start(&[&self.new]);
        let new = version(&daemon);
        assert_ne!(old, new, "they are two versions");
        let refused = daemon.api.resume("one");
        println!("{}", refused.body);
        assert_eq!(refused.status, 409, "{}", refused.body);
        assert_eq!(refused.body["code"], "incompatible_host");
        for version in [&old, &new] {
            let detail = refused.detail();
            assert!(detail.contains(version.as_str().unwrap()), "{detail}");
        }
        assert_eq!(daemon.api.sandbox("one").expect(200)["state"], "paused");
        daemon.stop();

        // Both, the new one first.
        let daemon = self.start(&[&self.new, &self.old]);
        assert_eq!(version(&daemon), new);
        daemon.api.resume("one").expect(200);
        daemon.api.create("clone", "warm");
        daemon.api.create("two", "base");
        let programs = ["one", "clone", "two"].map(|id| self.program_of(id));
        assert_eq!(programs[0], programs[1]);
        assert_ne!(programs[0], programs[2]);
        let before = self.pause(&daemon, "one", before, &old);
        self.pause(&daemon, "clone", Written::default(), &old);
        let two = self.pause(&daemon, "two", Written::default(), &new);
        for (id, before, version) in [("one", before, &old), ("two", two, &new)] {
            daemon.api.resume(id).expect(200);
            self.pause(&daemon, id, before, version);
        }
        daemon.api.delete_all();
        drop(stand_ins);
        assert_eq!(self.place.leftovers(), Vec::<String>::new());
        daemon.stop();
    }
}

/// An old one and a new one, or why there are none.
fn pair(variable: &str) -> Result<[PathBuf; 2], String> {
    let pair = [
        needs::real("second version", &format!("{variable}_OLD"))?,
        needs::real("second version", variable)?,
    ];
    for program in &pair {
        let said = Command::new(program).arg("--version").output().unwrap();
        println!("{}", String::from_utf8_lossy(&said.stdout));
    }
    Ok(pair)
}

#[test]
fn something_answers_for_guests_here() {
    stand_in::run_if_wanted();
}

#[test]
fn guest_of_an_old_firecracker_goes_on_in_it_beside_a_new_one() {
    use appliance::vmm::firecracker::probe_guest::elf_around;
    const NAME: &str = "guest_of_an_old_firecracker_goes_on_in_it_beside_a_new_one";
    let pair = match pair("THAW_FIRECRACKER") {
        Ok(pair) => pair,
        Err(reason) => return skip(NAME, &reason),
    };
    let elf = elf_around(&adder::long_mode());
    Subject::new("firecracker", "tvfire", 184, pair, &elf).builds_stay_with_their_makers();
}

#[test]
fn guest_of_an_old_cloud_hypervisor_goes_on_in_it_beside_a_new_one() {
    use appliance::vmm::cloud_hypervisor::probe_guest::elf_around;
    const NAME: &str = "guest_of_an_old_cloud_hypervisor_goes_on_in_it_beside_a_new_one";
    let pair = match pair("THAW_CLOUD_HYPERVISOR") {
        Ok(pair) => pair,
        Err(reason) => return skip(NAME, &reason),
    };
    let elf = elf_around(&adder::protected_mode());
    Subject::new("cloud-hypervisor", "tvcloud", 185, pair, &elf).builds_stay_with_their_makers();
}
