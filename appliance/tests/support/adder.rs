//! A guest of a few instructions that knows whether its memory is right: it numbers 256 pages once;
//! then, for ever, it counts a round, adds the numbers up, compares the sum with what it has to be,
//! writes the round into one of the pages, and says `ok` or `X`. What it has written is looked up
//! in its builds.

use std::time::Duration;

use serde_json::Value;
use snapshot_format::{BuildStore, PageIndex};

use super::place::Place;

pub(crate) const PAGE: u64 = 4096;
/// Where the guest counts its rounds, and after that the rounds in which its memory was wrong.
pub(crate) const COUNTER: u64 = 0x20_0000;
/// Where its numbered pages begin, and how many there are.
pub(crate) const NUMBERED: u64 = 0x100_0000;
pub(crate) const NUMBERS: u64 = 256;
/// 1 + 2 + … + 256.
pub(crate) const SUM: u32 = 0x8080;

/// Its code in 64-bit mode, as Firecracker begins.
pub(crate) fn long_mode() -> Vec<u8> {
    let mut code = vec![
        0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
        0x48, 0xC7, 0xC7, 0x00, 0x00, 0x00, 0x01, // mov rdi, NUMBERED
        0x31, 0xC9, // xor ecx, ecx
        0x8D, 0x41, 0x01, // number: lea eax, [rcx + 1]
        0x48, 0x89, 0x47, 0x08, // mov [rdi + 8], rax
        0x48, 0x81, 0xC7, 0x00, 0x10, 0x00, 0x00, // add rdi, PAGE
        0xFF, 0xC1, // inc ecx
        0x81, 0xF9, 0x00, 0x01, 0x00, 0x00, // cmp ecx, NUMBERS
        0x75, 0xE8, // jne number
    ];
    let round = code.len();
    code.extend_from_slice(&[
        0x48, 0xC7, 0xC3, 0x00, 0x00, 0x20, 0x00, // round: mov rbx, COUNTER
        0x48, 0xFF, 0x03, // inc qword [rbx]
        0x48, 0xC7, 0xC6, 0x00, 0x00, 0x00, 0x01, // mov rsi, NUMBERED
        0x31, 0xC0, // xor eax, eax
        0x31, 0xC9, // xor ecx, ecx
        0x48, 0x03, 0x46, 0x08, // add: add rax, [rsi + 8]
        0x48, 0x81, 0xC6, 0x00, 0x10, 0x00, 0x00, // add rsi, PAGE
        0xFF, 0xC1, // inc ecx
        0x81, 0xF9, 0x00, 0x01, 0x00, 0x00, // cmp ecx, NUMBERS
        0x75, 0xEB, // jne add
        0x48, 0x3D, // cmp rax, SUM
    ]);
    code.extend_from_slice(&SUM.to_le_bytes());
    code.extend_from_slice(&[
        0x74, 0x07, // je right
        0x48, 0xFF, 0x43, 0x08, // inc qword [rbx + 8]
        0xB0, b'X', 0xEE, // mov al, 'X'; out dx, al
        0x48, 0x8B, 0x03, // right: mov rax, [rbx]
        0x48, 0x89, 0xC1, // mov rcx, rax
        0x25, 0xFF, 0x00, 0x00, 0x00, // and eax, 255
        0xC1, 0xE0, 0x0C, // shl eax, 12
        0x48, 0x89, 0x88, 0x10, 0x00, 0x00, 0x01, // mov [rax + NUMBERED + 16], rcx
        0xB0, b'o', 0xEE, 0xB0, b'k', 0xEE, 0xB0, b'\n', 0xEE, // say "ok\n"
        0xB9, 0xC8, 0x00, 0x00, 0x00, // mov ecx, 200
        0xFF, 0xC9, // wait: dec ecx
        0x75, 0xFC, // jne wait
        0xE9, // jmp round
    ]);
    let back = round as i32 - (code.len() as i32 + 4);
    code.extend_from_slice(&back.to_le_bytes());
    code
}

/// Its code in 32-bit mode, as Cloud Hypervisor begins.
pub(crate) fn protected_mode() -> Vec<u8> {
    let mut code = vec![0x66, 0xBA, 0xF8, 0x03]; // mov dx, 0x3f8
    let word = |code: &mut Vec<u8>, opcode: &[u8], value: u64| {
        code.extend_from_slice(opcode);
        code.extend_from_slice(&(value as u32).to_le_bytes());
    };
    let not_equal = |code: &mut Vec<u8>, to: usize| {
        let from = code.len() as i64 + 2;
        code.extend_from_slice(&[0x75, (to as i64 - from) as i8 as u8]);
    };
    word(&mut code, &[0xBF], NUMBERED); // mov edi, NUMBERED
    code.extend_from_slice(&[0x31, 0xC9]); // xor ecx, ecx
    let number = code.len();
    code.extend_from_slice(&[0x8D, 0x41, 0x01]); // number: lea eax, [ecx + 1]
    code.extend_from_slice(&[0x89, 0x47, 0x08]); // mov [edi + 8], eax
    word(&mut code, &[0x81, 0xC7], PAGE); // add edi, PAGE
    code.push(0x41); // inc ecx
    word(&mut code, &[0x81, 0xF9], NUMBERS); // cmp ecx, NUMBERS
    not_equal(&mut code, number);
    let round = code.len();
    word(&mut code, &[0xBB], COUNTER); // round: mov ebx, COUNTER
    code.extend_from_slice(&[0xFF, 0x03]); // inc dword [ebx]
    word(&mut code, &[0xBE], NUMBERED); // mov esi, NUMBERED
    code.extend_from_slice(&[0x31, 0xC0, 0x31, 0xC9]); // xor eax, eax; xor ecx, ecx
    let add = code.len();
    code.extend_from_slice(&[0x03, 0x46, 0x08]); // add: add eax, [esi + 8]
    word(&mut code, &[0x81, 0xC6], PAGE); // add esi, PAGE
    code.push(0x41); // inc ecx
    word(&mut code, &[0x81, 0xF9], NUMBERS); // cmp ecx, NUMBERS
    not_equal(&mut code, add);
    word(&mut code, &[0x3D], u64::from(SUM)); // cmp eax, SUM
    code.extend_from_slice(&[
        0x74, 0x06, // je right
        0xFF, 0x43, 0x08, // inc dword [ebx + 8]
        0xB0, b'X', 0xEE, // mov al, 'X'; out dx, al
        0x8B, 0x03, // right: mov eax, [ebx]
        0x89, 0xC1, // mov ecx, eax
        0x25, 0xFF, 0x00, 0x00, 0x00, // and eax, 255
        0xC1, 0xE0, 0x0C, // shl eax, 12
    ]);
    word(&mut code, &[0x89, 0x88], NUMBERED + 16); // mov [eax + NUMBERED + 16], ecx
    code.extend_from_slice(&[0xB0, b'o', 0xEE, 0xB0, b'k', 0xEE, 0xB0, b'\n', 0xEE]);
    word(&mut code, &[0xB9], 200); // mov ecx, 200
    let wait = code.len();
    code.push(0x49); // wait: dec ecx
    not_equal(&mut code, wait);
    let back = round as i64 - (code.len() as i64 + 5);
    word(&mut code, &[0xE9], back as u64); // jmp round
    code
}

/// What a guest has written, as its build has it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Written {
    pub(crate) rounds: u64,
    pub(crate) wrong: u64,
    /// The last round that is in one of the pages.
    pub(crate) newest: u64,
}

impl Written {
    /// It has gone on since `before`, and was never wrong.
    #[track_caller]
    pub(crate) fn follows(&self, before: Self, who: &str) {
        assert!(self.rounds > before.rounds, "{who}: {} rounds", self.rounds);
        assert_eq!(self.wrong, 0, "{who}: of {} rounds", self.rounds);
    }
}

/// Looks into a build.
pub(crate) fn written(place: &Place, paused: &Value) -> Written {
    let store = BuildStore::open_or_create(&place.data.join("builds")).unwrap();
    let build = paused["build"].as_str().unwrap().parse().unwrap();
    let build = store.open(&build).unwrap();
    let page_bytes = build.map().page_size().bytes();
    let mut bytes = vec![0; page_bytes as usize];
    let mut words = |address: u64| -> [u64; 3] {
        let page = PageIndex::new(address / page_bytes);
        build.read_page(page, &mut bytes).unwrap();
        let first = (address % page_bytes) as usize;
        let word = |at: usize| u64::from_le_bytes(bytes[first + at..][..8].try_into().unwrap());
        [word(0), word(8), word(16)]
    };
    let [rounds, wrong, _] = words(COUNTER);
    let mut newest = 0;
    for number in 0..NUMBERS {
        let [_, is, round] = words(NUMBERED + number * PAGE);
        assert_eq!(is, number + 1, "page {number}");
        newest = newest.max(round);
    }
    Written {
        rounds,
        wrong,
        newest,
    }
}

/// The word at a place of a build's memory.
pub(crate) fn word(place: &Place, paused: &Value, at: u64) -> u64 {
    let store = BuildStore::open_or_create(&place.data.join("builds")).unwrap();
    let build = store.open(&paused["build"].as_str().unwrap().parse().unwrap());
    let mut bytes = vec![0; PAGE as usize];
    let page = PageIndex::new(at / PAGE);
    build.unwrap().read_page(page, &mut bytes).unwrap();
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

/// Lets it run for some rounds: there are KVMs that take a microsecond for an instruction.
pub(crate) fn run() {
    std::thread::sleep(Duration::from_millis(300));
}
