//! The tests of guests on other VMMs than QEMU by emulation, in an emulated machine: a stock kernel
//! gets up in few KVMs that aren't a processor's own, and that of an emulated processor is one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::confined::GROUPS;
use crate::support::machine::Machine;
use crate::support::{GUEST_MB, SLOWER, machine, needs, skip};

/// All of it, on a busy host.
const LIMIT: Duration = Duration::from_secs(1800);
/// The memory of a guest whose VMM asks for all of it, page by page: two switches of processes for
/// each, a few milliseconds there, and every pause waits for the last.
const SMALL_MB: &str = "128";
/// What the tests may take there, as a multiple.
const TIMES: &str = "6";
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// What this QEMU reads to boot a kernel on its `pc`, at one of these places.
const FIRMWARE: [(&str, [&str; 2]); 3] = [
    ("bios-256k.bin", ["/usr/share/seabios", "/usr/share/qemu"]),
    ("kvmvapic.bin", ["/usr/share/qemu", "/usr/share/seabios"]),
    (
        "linuxboot_dma.bin",
        ["/usr/share/qemu", "/usr/share/seabios"],
    ),
];
const LIFE: &str = "guest_lives_a_whole_life";
const FREED: &str = "balloon::guest_gives_back_what_it_frees";
const ALL: [&str; 3] = [
    LIFE,
    "damage::guest_is_intact_through_generations_and_damage",
    "guest_host_is_drained_and_says_what_happened_across_restarts",
];

/// A machine that has what guests are made of.
fn machine_for<'a>(vmm: &str, inputs: &'a Path) -> Machine<'a> {
    Machine::new(inputs)
        .memory_mb(3072)
        .file(inputs.join("vmlinuz"), "/inputs/vmlinuz")
        .file(inputs.join("initrd.img"), "/inputs/initrd.img")
        .file(inputs.join("base.ext4"), "/inputs/base.ext4")
        .program(needs::thaw(), "/thaw")
        .set("PATH", "/bin:/usr/bin")
        .set("THAW_INPUTS", "/inputs")
        .set("THAW_BIN", "/thaw")
        .set("THAW_TEST_VMM", vmm)
        .set(GROUPS, "1")
        .set(SLOWER, TIMES)
}

fn pass(machine: Machine<'_>, tests: &[&str]) {
    let options = ["--exact", "--nocapture", "--test-threads=1"];
    let arguments = [tests, &options].concat();
    let (code, lines) = machine.run_self(&arguments, LIMIT);
    assert_eq!(code, 0, "in the machine");
    let passed = format!("test result: ok. {} passed", tests.len());
    assert!(lines.iter().any(|line| line.starts_with(&passed)));
}

/// Where the inputs are, or what is missing for a machine.
fn inputs() -> Result<PathBuf, String> {
    let inputs = std::env::var_os("THAW_INPUTS").map(PathBuf::from);
    match machine::missing(inputs.as_deref()) {
        Some(reason) => Err(reason),
        None => Ok(inputs.unwrap_or_default()),
    }
}

fn on_a_given_vmm(test: &str, vmm: &str, variable: &str, called: &str) {
    let given = std::env::var_os(variable).map(PathBuf::from);
    let given = given.ok_or_else(|| format!("no {called} given ({variable})"));
    let (program, inputs) = match given.and_then(|program| Ok((program, inputs()?))) {
        Ok(found) => found,
        Err(reason) => return skip(test, &reason),
    };
    let _turn = needs::one_at_a_time();
    let mut machine = machine_for(vmm, &inputs);
    if vmm == "cloud-hypervisor" {
        machine = machine.set(GUEST_MB, SMALL_MB);
    }
    pass(machine.program(program, "/vmm").set(variable, "/vmm"), &ALL);
}

#[test]
fn guest_of_firecracker_in_an_emulated_machine() {
    on_a_given_vmm(
        "elsewhere::guest_of_firecracker_in_an_emulated_machine",
        "firecracker",
        "THAW_FIRECRACKER",
        "Firecracker",
    );
}

#[test]
fn guest_of_cloud_hypervisor_in_an_emulated_machine() {
    on_a_given_vmm(
        "elsewhere::guest_of_cloud_hypervisor_in_an_emulated_machine",
        "cloud-hypervisor",
        "THAW_CLOUD_HYPERVISOR",
        "Cloud Hypervisor",
    );
}

/// The one of Debian, with the kernel's KVM.
#[test]
fn guest_of_qemu_and_kvm_in_an_emulated_machine() {
    const TEST: &str = "elsewhere::guest_of_qemu_and_kvm_in_an_emulated_machine";
    let found = inputs().and_then(|inputs| Ok((inputs, needs::for_guests()?, firmware()?)));
    let (inputs, guests, firmware) = match found {
        Ok(found) => found,
        Err(reason) => return skip(TEST, &reason),
    };
    let _turn = needs::one_at_a_time();
    let mut machine = machine_for("qemu-kvm", &inputs)
        .program(QEMU, QEMU)
        .program(guests.preload, "/preload.so")
        .set("THAW_PRELOAD", "/preload.so");
    for (from, to) in &firmware {
        machine = machine.file(from, to);
    }
    pass(machine, &[LIFE, FREED]);
}

/// Where the firmware is, and where it has to be: QEMU looks there whatever its package does.
fn firmware() -> Result<Vec<(PathBuf, String)>, String> {
    let mut found = vec![];
    for (name, places) in FIRMWARE {
        let mut paths = places.iter().map(|place| Path::new(place).join(name));
        let path = paths.find(|path| path.is_file());
        let path = path.ok_or_else(|| format!("no {name} of QEMU's"))?;
        found.push((path, format!("/usr/share/qemu/{name}")));
    }
    if !Path::new(QEMU).is_file() {
        return Err(format!("no {QEMU}"));
    }
    Ok(found)
}
