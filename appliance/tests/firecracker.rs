//! A real Firecracker, as `THAW_FIRECRACKER` names it: a guest of a few instructions lives under
//! the daemon, its memory served by the engine, and says through its serial port and in its
//! memory whether every byte of it is right.
//!
//! Such a guest runs where stock kernels don't: on nested and paravirtual KVMs. It has no `envd`;
//! something else answers at its address (see `support/stand_in`).

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use appliance::vmm::firecracker::probe_guest::elf_around;
use support::adder::{self, NUMBERS, PAGE, SUM, run};
use support::daemon::Daemon;
use support::huge::{self, Allowed};
use support::life::Life;
use support::place::{Place, quoted};
use support::stand_in::{self, StandIns};
use support::{needs, skip};

/// The test that a stand-in's process runs as.
const STAND_IN: &str = "the_guest_adds_up_what_it_has_written";
const MEMORY_MB: u64 = 64;
/// Where memory goes on above the gap for devices, and how much of it lies below.
const HIGH: u64 = 4 << 30;
const BELOW_GAP: u64 = 3 << 30;

/// The program, or why there is none.
fn firecracker() -> Result<PathBuf, String> {
    needs::real("Firecracker", "THAW_FIRECRACKER")
}

fn place(instance: &str, pool: u16, firecracker: &Path, jailer: Option<&Path>) -> Place {
    let jailer = jailer.map(|jailer| format!("jailer = {}\n", quoted(jailer)));
    let vmm = format!(
        "driver = \"firecracker\"\nvsock = true\nfirecracker = [{}]\n{}\
         [disks]\nmib_per_s = 64\nops_per_s = 5000\n",
        quoted(firecracker),
        jailer.unwrap_or_default(),
    );
    let kernel = elf_around(&adder::long_mode());
    Place::with_template(instance, pool, &vmm, &kernel, MEMORY_MB)
}

#[test]
fn the_guest_adds_up_what_it_has_written() {
    stand_in::run_if_wanted();
    // Jumps that were counted by hand.
    let code = adder::long_mode();
    let lands = |at: usize, on: &[u8]| {
        let target = (at as i64 + 2 + i64::from(code[at + 1] as i8)) as usize;
        assert_eq!(code[target..target + on.len()], *on, "the jump at {at}");
    };
    let find = |bytes: &[u8]| {
        code.windows(bytes.len())
            .position(|part| part == bytes)
            .unwrap()
    };
    lands(find(&[0x75, 0xE8]), &[0x8D, 0x41]);
    lands(find(&[0x75, 0xEB]), &[0x48, 0x03, 0x46]);
    lands(find(&[0x74, 0x07]), &[0x48, 0x8B, 0x03]);
    lands(find(&[0x75, 0xFC]), &[0xFF, 0xC9]);
    let numbers: u64 = (1..=NUMBERS).sum();
    assert_eq!(numbers, u64::from(SUM));
}

/// A whole life of the guest, in a jail or not, in VMMs that waited for it or not.
fn live(place: &Place, waiting: bool) {
    if waiting {
        place.reconfigure(&[("ready_slots = 0", "ready_slots = 2")]);
    }
    let mut daemon = Daemon::start(place);
    let stand_ins = StandIns::watch(&place.instance, STAND_IN);
    let api = &daemon.api.clone();
    let host = api.get("/v1/host").expect(200);
    println!("{}", host["vmm"]);
    let reason = host["vmm"]["reason"].as_str().unwrap();
    assert!(
        reason.contains("states are saved by themselves"),
        "{reason}"
    );

    let mut life = Life::begin(place, api, waiting);
    for cycle in 0..10 {
        let memory = life.pause(cycle);
        let stored = memory["diff_pages"].as_u64().unwrap();
        let is_huge = memory["page_bytes"] != PAGE;
        let most = if is_huge { 8 } else { 700 };
        assert!(stored < most, "{stored} pages");
        life.resume();
        run();
        if [1, 5, 9].contains(&cycle) {
            if cycle == 5 {
                // Nobody serves its memory any more: it goes on when somebody does.
                daemon.kill_with_engines(place);
                run();
                daemon = Daemon::start(place);
            } else {
                daemon = daemon.killed_and_followed(place);
            }
            run();
        }
        let memory = api.get("/v1/sandboxes/one/memory").expect(200);
        let number = |key: &str| memory[key].as_u64().unwrap();
        let resident = number("resident_pages") * number("page_bytes") / PAGE;
        assert!((NUMBERS..4096).contains(&resident), "{memory}");
    }

    life.snapshot();
    for id in ["one", "two"] {
        let socket = place.run.join("sandboxes").join(id).join("vmm/vsock.sock");
        let connected = std::os::unix::net::UnixStream::connect(&socket);
        connected.unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
    }
    life.pause_both();

    api.resume("one").expect(200);
    run();
    life.end(daemon, stand_ins);
}

#[test]
fn guest_of_a_real_firecracker_lives_a_whole_life() {
    const NAME: &str = "guest_of_a_real_firecracker_lives_a_whole_life";
    match firecracker() {
        Ok(program) => live(&place("tfreal", 170, &program, None), false),
        Err(reason) => skip(NAME, &reason),
    }
}

#[test]
fn guest_of_a_real_firecracker_finds_one_that_waits() {
    const NAME: &str = "guest_of_a_real_firecracker_finds_one_that_waits";
    match firecracker() {
        Ok(program) => live(&place("tfwait", 173, &program, None), true),
        Err(reason) => skip(NAME, &reason),
    }
}

#[test]
fn guest_of_a_real_firecracker_has_huge_pages() {
    const NAME: &str = "guest_of_a_real_firecracker_has_huge_pages";
    let able = firecracker().and_then(|program| Ok((program, huge::turn()?)));
    let allowed = able.and_then(|(program, turn)| {
        let allowed = Allowed::mib(turn, 2 * MEMORY_MB)?;
        Ok((program, allowed))
    });
    match allowed {
        Ok((program, _allowed)) => {
            let place = place("tfrhug", 175, &program, None);
            let memory = format!("memory_mb = {MEMORY_MB}\n");
            place.reconfigure(&[(&memory, &format!("{memory}huge_pages = true\n"))]);
            live(&place, false);
        }
        Err(reason) => skip(NAME, &reason),
    }
}

/// The guests' kernel decides: it is unpacked and started, and Firecracker is taken only if it
/// gets up.
#[test]
fn guest_kernels_decide_between_vmms() {
    const NAME: &str = "guest_kernels_decide_between_vmms";
    let found = firecracker().and_then(|program| Ok((program, needs::for_guests()?)));
    let (program, inputs) = match found {
        Ok(found) => found,
        Err(reason) => return skip(NAME, &reason),
    };
    let place = Place::new("tfauto", 172, Some(&inputs));
    let line = format!(
        "[vmm]\nfirecracker = [{:?}]\n",
        program.display().to_string()
    );
    place.reconfigure(&[("[vmm]\n", &line)]);
    let daemon = Daemon::start(&place);
    let vmm = daemon.api.get("/v1/host").expect(200)["vmm"].clone();
    println!("{vmm}");
    let reason = vmm["reason"].as_str().unwrap();
    let said = if vmm["name"] == "firecracker" {
        "the guests' kernel got up"
    } else {
        "no Firecracker: the guests' kernel does not get up: The VMM of the probe did not finish \
         printing \"Kernel panic"
    };
    assert!(reason.contains(said), "{reason}");
    let kernels: Vec<_> = fs::read_dir(place.data.join("kernels")).unwrap().collect();
    let [Ok(kernel)] = &kernels[..] else {
        panic!("{kernels:?}")
    };
    let elf = fs::read(kernel.path()).unwrap();
    // 64 bits, for x86-64.
    assert_eq!((&elf[..5], elf[18]), (&b"\x7fELF\x02"[..], 62));
    daemon.stop();
}

#[test]
fn guest_of_a_jailed_firecracker_lives_a_whole_life() {
    const NAME: &str = "guest_of_a_jailed_firecracker_lives_a_whole_life";
    let program = match firecracker() {
        Ok(program) => program,
        Err(reason) => return skip(NAME, &reason),
    };
    match needs::given("THAW_JAILER") {
        Some(jailer) => live(&place("tfjail", 171, &program, Some(&jailer)), false),
        None => skip(NAME, "no jailer given (THAW_JAILER)"),
    }
}

#[test]
fn guest_of_a_jailed_firecracker_finds_one_that_waits() {
    const NAME: &str = "guest_of_a_jailed_firecracker_finds_one_that_waits";
    let program = match firecracker() {
        Ok(program) => program,
        Err(reason) => return skip(NAME, &reason),
    };
    match needs::given("THAW_JAILER") {
        Some(jailer) => live(&place("tfjawa", 174, &program, Some(&jailer)), true),
        None => skip(NAME, "no jailer given (THAW_JAILER)"),
    }
}

/// Counts for ever in the first page above 4 GiB, which lies in the second of two regions, and copies
/// the count to where the small guests have theirs.
fn high_counter() -> Vec<u8> {
    let mut code = vec![0x48, 0xB8]; // mov rax, HIGH | present, writable, 2 MiB
    code.extend_from_slice(&(HIGH | 0x83).to_le_bytes());
    code.extend_from_slice(&[
        0x48, 0x89, 0x04, 0x25, 0x00, 0xC0, 0x00, 0x00, // mov [0xc000], rax: a directory
        // mov qword [0xa020], 0xc003: the fifth GiB is in it
        0x48, 0xC7, 0x04, 0x25, 0x20, 0xA0, 0x00, 0x00, 0x03, 0xC0, 0x00, 0x00, //
        0x48, 0xBB, // mov rbx, HIGH
    ]);
    code.extend_from_slice(&HIGH.to_le_bytes());
    code.extend_from_slice(&[0x66, 0xBA, 0xF8, 0x03]); // mov dx, 0x3f8
    let round = code.len();
    code.extend_from_slice(&[
        0x48, 0xFF, 0x03, // round: inc qword [rbx]
        0x48, 0x8B, 0x03, // mov rax, [rbx]
        0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, // mov [COUNTER], rax
        0xB0, b'o', 0xEE, 0xB0, b'k', 0xEE, 0xB0, b'\n', 0xEE, // say "ok\n"
        0xB9, 0x00, 0x10, 0x00, 0x00, // mov ecx, 0x1000
        0xFF, 0xC9, // wait: dec ecx
        0x75, 0xFC, // jne wait
        0xE9, // jmp round
    ]);
    let back = round as i32 - (code.len() as i32 + 4);
    code.extend_from_slice(&back.to_le_bytes());
    code
}

/// What is above the gap for devices is served, saved and found again.
#[test]
fn guest_of_a_real_firecracker_with_two_regions_keeps_its_pages() {
    const NAME: &str = "guest_of_a_real_firecracker_with_two_regions_keeps_its_pages";
    let program = match firecracker() {
        Ok(program) => program,
        Err(reason) => return skip(NAME, &reason),
    };
    let place = place("tfhigh", 176, &program, None);
    let small = format!("memory_mb = {MEMORY_MB}");
    place.reconfigure(&[(&small, "memory_mb = 3200")]);
    fs::write(place.root.join("kernel"), elf_around(&high_counter())).unwrap();
    let daemon = Daemon::start(&place);
    let stand_ins = StandIns::watch(&place.instance, STAND_IN);
    let api = &daemon.api;
    api.create("one", "base");
    let mut before = 0;
    for cycle in 0..3 {
        run();
        let paused = api.pause("one").expect(200);
        let high = adder::word(&place, &paused, BELOW_GAP);
        let copied = adder::word(&place, &paused, adder::COUNTER);
        println!("cycle {cycle}: {high} above, {copied} below");
        assert!(high > before, "cycle {cycle}: {high} after {before}");
        assert!(high - copied <= 1, "cycle {cycle}: {copied} of {high}");
        before = high;
        api.resume("one").expect(200);
    }
    api.delete_all();
    drop(stand_ins);
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}
