//! Wall-clock time and fresh randomness, the two things that can't be replayed.

use std::time::{SystemTime, UNIX_EPOCH};

use http_api::ids::{SandboxId, TemplateName};
use snapshot_format::BuildId;

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Fresh random bytes.
///
/// # Panics
/// The kernel has no randomness to give, which it always has once booted.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel gives randomness");
    bytes
}

/// An id that no build had before.
#[must_use]
pub fn new_build_id() -> BuildId {
    BuildId::from_bytes(random())
}

/// An id that no run of a sandbox had before.
#[must_use]
pub fn new_execution_id() -> String {
    hex(&random::<16>())
}

/// A secret for one sandbox's guest.
#[must_use]
pub fn new_access_token() -> String {
    hex(&random::<32>())
}

/// Two digits a byte.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A name for a template whose creator chose none: what it is for, and 20 letters and digits.
#[must_use]
pub fn new_template_name(purpose: &str) -> TemplateName {
    let id = new_sandbox_id();
    let text = format!("{purpose}-{}", &id.as_str()[2..]);
    text.parse()
        .unwrap_or_else(|error| panic!("a generated name is not valid: {error}"))
}

/// An id for a sandbox whose creator chose none: `sb` and 20 letters and digits.
#[must_use]
pub fn new_sandbox_id() -> SandboxId {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let letters = random::<20>().map(|byte| char::from(ALPHABET[usize::from(byte % 32)]));
    let text: String = "sb".chars().chain(letters).collect();
    text.parse()
        .unwrap_or_else(|error| panic!("a generated id is not valid: {error}"))
}
