//! A real vCPU: a guest of a few instructions walks its memory through `/dev/kvm` while the
//! engine serves it, and says every byte it reads through its serial port.
#![allow(unsafe_code, reason = "a guest's memory is lent to KVM by address")]

mod support;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use snapshot_format::{PageCount, PageIndex};
use support::{Guest, Host, PAGE, evict, has_uffd, skip};
use uffd_engine::{PageState, PageStates};

/// All that real mode reaches.
const PAGES: u64 = 256;
const SERIAL: u16 = 0x3F8;
/// Where the guest's program lies: in its memory, so it comes out of the build, too.
const PROGRAM: u64 = 0xF010;

/// For each page: read its first and its last byte, add one to a byte in its middle, and send
/// all three.
const WALK: [u8; 28] = [
    0xBA, 0xF8, 0x03, // mov dx, 0x3f8
    0x31, 0xC9, // xor cx, cx
    0x8E, 0xD9, // page: mov ds, cx
    0xA0, 0x00, 0x00, // mov al, [0]
    0xEE, // out dx, al
    0xA0, 0xFF, 0x0F, // mov al, [0xfff]
    0xEE, // out dx, al
    0xFE, 0x06, 0x00, 0x08, // inc byte [0x800]
    0xA0, 0x00, 0x08, // mov al, [0x800]
    0xEE, // out dx, al
    0x81, 0xC1, 0x00, 0x01, // add cx, 0x100
    0x75, // jnz page
];
const WALK_BACK: u8 = 0xE8;
const HALT: u8 = 0xF4;

fn byte(page: u64, place: u64) -> u8 {
    (page * 7 + place * 31 + 1) as u8
}

fn is_zero(page: u64) -> bool {
    page % 4 == 3 && page != PROGRAM / PAGE
}

fn content(page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    if !is_zero(page) {
        bytes[0] = byte(page, 0);
        bytes[0xFFF] = byte(page, 1);
        bytes[0x800] = byte(page, 2);
    }
    if page == PROGRAM / PAGE {
        let at = (PROGRAM % PAGE) as usize;
        bytes[at..at + WALK.len()].copy_from_slice(&WALK);
        bytes[at + WALK.len()] = WALK_BACK;
        bytes[at + WALK.len() + 1] = HALT;
    }
    bytes
}

/// What the guest says in its `walk`th walk through memory of which `given_back` pages are gone.
fn expected(walk: u8, given_back: std::ops::Range<u64>) -> Vec<u8> {
    let of = |page: u64| {
        if given_back.contains(&page) {
            return [0, 0, 1];
        }
        let bytes = content(page);
        [bytes[0], bytes[0xFFF], bytes[0x800].wrapping_add(walk)]
    };
    (0..PAGES).flat_map(of).collect()
}

struct Machine {
    vcpu: VcpuFd,
    _vm: VmFd,
}

impl Machine {
    fn new(kvm: &Kvm, guest: &Guest) -> Self {
        let vm = kvm.create_vm().unwrap();
        let slot = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: PAGES * PAGE,
            userspace_addr: guest.memory.base().get(),
            flags: 0,
        };
        // SAFETY: the mapping is as long as the slot and outlives the machine.
        unsafe { vm.set_user_memory_region(slot) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Self { vcpu, _vm: vm }
    }

    /// Runs the program once; what it sent.
    fn walk(&mut self) -> Vec<u8> {
        let mut special = self.vcpu.get_sregs().unwrap();
        special.cs.base = 0;
        special.cs.selector = 0;
        self.vcpu.set_sregs(&special).unwrap();
        let mut registers = self.vcpu.get_regs().unwrap();
        registers.rip = PROGRAM;
        registers.rflags = 2;
        self.vcpu.set_regs(&registers).unwrap();
        let mut sent = Vec::new();
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoOut(SERIAL, bytes) => sent.extend_from_slice(bytes),
                VcpuExit::Hlt => return sent,
                other => panic!("after {} bytes: {other:?}", sent.len()),
            }
        }
    }
}

fn kvm(test: &str) -> Option<Kvm> {
    if !has_uffd(test) {
        return None;
    }
    Kvm::new()
        .inspect_err(|error| skip(test, &format!("no /dev/kvm: {error}")))
        .ok()
}

#[test]
fn every_byte_that_a_vcpu_reads_is_the_builds() {
    let Some(kvm) = kvm("every_byte_that_a_vcpu_reads_is_the_builds") else {
        return;
    };
    let mut host = Host::serving(PAGES, content);
    let states = PageStates::create(PageCount::new(PAGES)).unwrap();
    let guest = host.attach("vm", &states);
    let mut machine = Machine::new(&kvm, &guest);
    assert_eq!(machine.walk(), expected(1, 0..0));
    let faults = host.stats("vm").faults;
    assert!(faults > 0, "nothing was served");
    // What it wrote stays, and no page is asked for twice.
    assert_eq!(machine.walk(), expected(2, 0..0));
    assert_eq!(host.stats("vm").faults, faults);
    drop(machine);
    host.detach("vm");
    for page in 0..PAGES {
        assert!(states.get(PageIndex::new(page)).is_installed(), "{page}");
    }
}

#[test]
fn a_vcpu_reads_zero_where_memory_was_given_back() {
    let Some(kvm) = kvm("a_vcpu_reads_zero_where_memory_was_given_back") else {
        return;
    };
    let mut host = Host::serving(PAGES, content);
    evict(&host.data_file());
    let states = PageStates::create(PageCount::new(PAGES)).unwrap();
    let guest = host.attach("vm", &states);
    let mut machine = Machine::new(&kvm, &guest);
    assert_eq!(machine.walk(), expected(1, 0..0));
    guest.memory.give_back(32 * PAGE, 64 * PAGE).unwrap();
    assert_eq!(machine.walk(), expected(2, 32..96));
    drop(machine);
    host.detach("vm");
    assert_ne!(states.get(PageIndex::new(40)), PageState::Missing);
}
