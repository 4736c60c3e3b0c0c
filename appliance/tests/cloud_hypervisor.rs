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
use support::adder::{self, NUMBERS, SUM, run};
use support::daemon::Daemon;
use support::huge::{self, Allowed};
use support::life::Life;
use support::place::{Place, quoted};
use support::stand_in::{self, StandIns};
use support::{needs, procs, restored, skip, wait_for};

/// The test that a stand-in's process runs as.
const STAND_IN: &str = "the_guest_adds_up_what_it_has_written";
const MEMORY_MB: u64 = 64;
const PAGES: u64 = MEMORY_MB << 8;

/// The program, or why there is none.
fn cloud_hypervisor() -> Result<PathBuf, String> {
    needs::real("Cloud Hypervisor", "THAW_CLOUD_HYPERVISOR")
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
    let vmm = format!(
        "driver = \"cloud-hypervisor\"\ncloud_hypervisor = [{}]\n",
        quoted(program)
    );
    Place::with_template(instance, pool, &vmm, &elf_around(guest), MEMORY_MB)
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

    let mut life = Life::begin(&place, api, waiting);
    for cycle in 0..10 {
        let memory = life.pause(cycle);
        let stored = memory["diff_pages"].as_u64().unwrap();
        assert!(stored < 700, "{stored} pages");
        life.resume();
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

    life.snapshot();
    life.pause_both();

    api.resume("one").expect(200);
    wait_for("it says so", Duration::from_secs(20), || {
        let console = api.get("/v1/sandboxes/one/console").expect(200);
        let lines = console.as_array().unwrap().iter();
        (lines.filter(|line| line["line"] == "ok").count() > 3).then_some(())
    });
    life.end(daemon, stand_ins);
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
    let reason = api.failure("one");
    assert!(reason.contains("the guest restarted"), "{reason}");
    assert_eq!(reason.matches("bye").count(), 1, "{reason}");
    api.delete_all();
    drop(stand_ins);
    daemon.stop();
}
