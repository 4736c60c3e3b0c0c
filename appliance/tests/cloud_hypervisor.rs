//! A real Cloud Hypervisor, as `THAW_CLOUD_HYPERVISOR` names it: a guest of a few instructions lives
//! under the daemon, its memory asked for and served by the engine, and says through its serial port
//! and in its memory whether every byte of it is right.
//!
//! Such a guest runs where stock kernels don't. It has no `envd`; something else answers at its
//! address (see `support/stand_in`).

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use appliance::vmm::cloud_hypervisor::probe_guest::elf_around;
use serde_json::Value;
use support::adder::{self, NUMBERS, SUM, Written, run, written};
use support::daemon::Daemon;
use support::huge::{self, Allowed};
use support::place::Place;
use support::stand_in::{self, StandIns};
use support::{needs, procs, restored, skip, wait_for};

/// The test that a stand-in's process runs as.
const STAND_IN: &str = "the_guest_adds_up_what_it_has_written";
const MEMORY_MB: u64 = 64;
const PAGES: u64 = MEMORY_MB << 8;

/// The program, or why there is none.
fn cloud_hypervisor() -> Result<PathBuf, String> {
    needs::for_fakes()?;
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("no /dev/kvm: {error}"))?;
    let variable = "THAW_CLOUD_HYPERVISOR";
    let path = std::env::var_os(variable);
    let path = PathBuf::from(path.ok_or("no Cloud Hypervisor given (THAW_CLOUD_HYPERVISOR)")?);
    assert!(
        path.is_file(),
        "{variable} is {}, which is no file",
        path.display()
    );
    Ok(path)
}

/// What this host's KVM lacks, by the words of the daemon that found out.
fn missing(place: &Place) -> Option<&'static str> {
    let log = fs::read_to_string(&place.log).unwrap();
    log.contains("GetNestedState").then_some(
        "this KVM hands out no state of nested guests (KVM_CAP_NESTED_STATE), and Cloud Hypervisor \
         saves no guest without",
    )
}

/// A daemon in a place, or why there can be none.
fn start(place: &Place) -> Result<Daemon, &'static str> {
    Daemon::try_start(place).map_err(|status| {
        missing(place).unwrap_or_else(|| panic!("the daemon ended at its start: {status}"))
    })
}

fn place(instance: &str, pool: u16, program: &Path, guest: &[u8]) -> Place {
    let place = Place::new(instance, pool, None);
    let quoted = |path: &Path| toml::Value::String(path.display().to_string()).to_string();
    let file = |name: &str, bytes: &[u8]| {
        let path = place.root.join(name);
        fs::write(&path, bytes).unwrap();
        quoted(&path)
    };
    let (kernel, initrd) = (file("kernel", &elf_around(guest)), file("initrd", b"none"));
    let disk = file("disk", &vec![0; 1 << 20]);
    let mut text = fs::read_to_string(&place.config).unwrap();
    text += &format!(
        "driver = \"cloud-hypervisor\"\ncloud_hypervisor = [{}]\n[engine]\ncheck_writes = true\n\
         [[template]]\nname = \"base\"\nkernel = {kernel}\ninitrd = {initrd}\ndisk = {disk}\n\
         memory_mb = {MEMORY_MB}\n",
        quoted(program),
    );
    fs::write(&place.config, text).unwrap();
    place
}

#[test]
fn the_guest_adds_up_what_it_has_written() {
    stand_in::run_if_wanted();
    // The jump that was counted by hand.
    let code = adder::protected_mode();
    let find = |bytes: &[u8]| {
        code.windows(bytes.len())
            .position(|part| part == bytes)
            .unwrap()
    };
    assert_eq!(find(&[0x74, 0x06]) + 2 + 6, find(&[0x8B, 0x03]));
    let numbers: u64 = (1..=NUMBERS).sum();
    assert_eq!(numbers, u64::from(SUM));
}

#[test]
fn guest_of_a_real_cloud_hypervisor_lives_a_whole_life() {
    const NAME: &str = "guest_of_a_real_cloud_hypervisor_lives_a_whole_life";
    live(NAME, ("tcreal", 230), &[]);
}

#[test]
fn guest_of_a_real_cloud_hypervisor_finds_one_that_waits() {
    const NAME: &str = "guest_of_a_real_cloud_hypervisor_finds_one_that_waits";
    live(
        NAME,
        ("tcwait", 232),
        &[("ready_slots = 0", "ready_slots = 2")],
    );
}

#[test]
fn guest_of_a_real_cloud_hypervisor_has_huge_pages() {
    const NAME: &str = "guest_of_a_real_cloud_hypervisor_has_huge_pages";
    let able = cloud_hypervisor().and_then(|_| huge::turn());
    match able.and_then(|turn| Allowed::mib(turn, 2 * MEMORY_MB)) {
        Ok(_allowed) => {
            let memory = format!("memory_mb = {MEMORY_MB}\n");
            let huge = format!("{memory}huge_pages = true\n");
            live(NAME, ("tcrhug", 233), &[(&memory, &huge)]);
        }
        Err(reason) => skip(NAME, &reason),
    }
}

/// Whether the VMM of the sandbox `one` was told to confine itself by Landlock; it does nothing more
/// if it can't then.
fn is_confined(place: &Place) -> bool {
    let socket = place.run.join("sandboxes/one/vmm/api.sock");
    let mut stream = UnixStream::connect(socket).unwrap();
    // It keeps connections open.
    write!(stream, "GET /api/v1/vm.info HTTP/1.1\r\nHost: vmm\r\n\r\n").unwrap();
    let mut lines = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let line = line.trim().to_lowercase();
        if let Some(bytes) = line.strip_prefix("content-length: ") {
            length = bytes.parse().unwrap();
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    lines.read_exact(&mut body).unwrap();
    let info: Value = serde_json::from_slice(&body).unwrap();
    info["config"]["landlock_enable"] == true
}

/// A whole life of the guest, with changes of the configuration: in VMMs that waited for it, say.
fn live(test: &str, (instance, pool): (&str, u16), changes: &[(&str, &str)]) {
    let program = match cloud_hypervisor() {
        Ok(program) => program,
        Err(reason) => return skip(test, &reason),
    };
    let place = place(instance, pool, &program, &adder::protected_mode());
    place.reconfigure(changes);
    let waiting = changes.iter().any(|(_, to)| to.contains("ready_slots"));
    let mut daemon = match start(&place) {
        Ok(daemon) => daemon,
        Err(reason) => return skip(test, reason),
    };
    let stand_ins = StandIns::watch(&place.instance, STAND_IN);
    let api = &daemon.api.clone();
    let host = api.get("/v1/host").expect(200);
    println!("{}", host["vmm"]);

    api.create("one", "base");
    run();
    let mut before = Written::default();
    for cycle in 0..10 {
        let paused = api.pause("one").expect(200);
        assert_eq!(paused["generation"], cycle, "{paused}");
        let now = written(&place, &paused);
        assert!(
            now.rounds > before.rounds,
            "cycle {cycle}: {} rounds",
            now.rounds
        );
        assert_eq!(now.wrong, 0, "cycle {cycle}: of {} rounds", now.rounds);
        assert!(
            now.rounds - now.newest <= 1,
            "cycle {cycle}: {} is newest",
            now.newest
        );
        let memory = api.get("/v1/sandboxes/one/memory").expect(200);
        let stored = memory["diff_pages"].as_u64().unwrap();
        println!(
            "cycle {cycle}: {} rounds, {stored} pages stored",
            now.rounds
        );
        assert!(stored < 700, "{stored} pages");
        before = now;
        if waiting {
            restored::wait_for_vmm(api);
        }
        api.resume("one").expect(200);
        // Soon: it still asks for its memory.
        if [1, 5, 9].contains(&cycle) {
            daemon = daemon.killed_and_followed(&place);
        }
        assert!(is_confined(&place), "{}", host["vmm"]);
        let vmm = restored::vmm(&place);
        assert_eq!(vmm.status("Uid:"), ["200000"; 4], "{}", host["vmm"]);
        assert_eq!(vmm.status("CapEff:"), ["0000000000000000"]);
        assert_eq!(vmm.status("NoNewPrivs:"), ["1"]);
        if cycle % 2 == 1 {
            // While it asks for its memory: a successor answers what this one has not.
            procs::engine(&place).expect("an engine").kill();
        }
        run();
        let memory = api.get("/v1/sandboxes/one/memory").expect(200);
        let resident = memory["resident_pages"].as_u64().unwrap();
        assert!((1..=PAGES).contains(&resident), "{memory}");
    }

    // From one that runs, and goes on.
    api.snapshot("one", "warm").expect(201);
    api.create("two", "warm");
    run();
    for id in ["one", "two"] {
        let now = written(&place, &api.pause(id).expect(200));
        assert!(
            now.rounds > before.rounds && now.wrong == 0,
            "{id}: {}",
            now.rounds
        );
    }

    // Its serial port, at the last: whatever it said is in the reason of its end.
    api.resume("one").expect(200);
    wait_for("it says so", Duration::from_secs(20), || {
        let console = api.get("/v1/sandboxes/one/console").expect(200);
        let lines = console.as_array().unwrap().iter();
        (lines.filter(|line| line["line"] == "ok").count() > 3).then_some(())
    });
    restored::found_one_waiting(&place, waiting.then_some(10));
    restored::vmm(&place).kill();
    let reason = wait_for("it has failed", Duration::from_secs(20), || {
        let sandbox = api.sandbox("one").expect(200);
        (sandbox["state"] == "failed").then(|| sandbox["reason"].clone())
    });
    let reason = reason.as_str().unwrap().to_owned();
    assert!(reason.contains("killed by SIGKILL"), "{reason}");
    assert!(reason.contains("ok | ok | ok"), "{reason}");
    assert!(!reason.contains('X'), "{reason}");
    api.delete_all();
    drop(stand_ins);
    if waiting {
        daemon.stop();
        assert_eq!(place.leftovers(), Vec::<String>::new());
    } else {
        assert_eq!(place.leftovers(), Vec::<String>::new());
        daemon.stop();
    }
    assert_eq!(place.leftovers_of_the_daemon(), Vec::<String>::new());
}

/// Cloud Hypervisor would boot it again, from the disk of its first life.
#[test]
fn guest_of_a_real_cloud_hypervisor_that_restarts_has_ended() {
    const NAME: &str = "guest_of_a_real_cloud_hypervisor_that_restarts_has_ended";
    let program = match cloud_hypervisor() {
        Ok(program) => program,
        Err(reason) => return skip(NAME, &reason),
    };
    let mut guest = vec![0x66, 0xBA, 0xF8, 0x03]; // mov dx, 0x3f8
    for byte in *b"bye\n" {
        guest.extend_from_slice(&[0xB0, byte, 0xEE]); // mov al, byte; out dx, al
    }
    guest.extend_from_slice(&[
        0xB9, 0x00, 0x00, 0x40, 0x00, // mov ecx, 0x400000
        0x49, // wait: dec ecx
        0x75, 0xFD, // jne wait
        0xB0, 0xFE, 0xE6, 0x64, // mov al, 0xfe; out 0x64, al: the keyboard's way to a reset
        0xF4, 0xEB, 0xFD, // halt: hlt; jmp halt
    ]);
    let place = place("tcstart", 231, &program, &guest);
    let daemon = match start(&place) {
        Ok(daemon) => daemon,
        Err(reason) => return skip(NAME, reason),
    };
    let stand_ins = StandIns::watch(&place.instance, STAND_IN);
    let api = &daemon.api;
    api.create("one", "base");
    let reason = wait_for("it has failed", Duration::from_secs(20), || {
        let sandbox = api.sandbox("one").expect(200);
        (sandbox["state"] == "failed").then(|| sandbox["reason"].clone())
    });
    let reason = reason.as_str().unwrap().to_owned();
    assert!(reason.contains("the guest restarted"), "{reason}");
    assert_eq!(reason.matches("bye").count(), 1, "{reason}");
    api.delete_all();
    drop(stand_ins);
    daemon.stop();
}
