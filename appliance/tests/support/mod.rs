//! A daemon of a test's own, driven from outside: its program, its HTTP socket, and what the
//! kernel shows of it.
//!
//! A [`Place`] has a name, directories and addresses that no other test has. Whatever happens,
//! its end kills every process that belongs to it (by pidfd) and removes what it left.

#![allow(dead_code, reason = "every test binary uses a part of it")]

pub(crate) mod adder;
pub(crate) mod api;
#[path = "../../../envd/tests/packages/mod.rs"]
pub(crate) mod clients;
pub(crate) mod daemon;
pub(crate) mod disk_scenarios;
pub(crate) mod fake;
#[path = "../../../uffd-engine/tests/support/huge.rs"]
pub(crate) mod huge;
pub(crate) mod life;
pub(crate) mod machine;
pub(crate) mod needs;
pub(crate) mod net;
pub(crate) mod place;
pub(crate) mod procs;
pub(crate) mod restored;
pub(crate) mod slots;
pub(crate) mod stand_in;
pub(crate) mod workload;

use std::time::{Duration, Instant};

/// Set where everything takes longer: how many times as long.
pub(crate) const SLOWER: &str = "THAW_TEST_SLOWER";

/// How many times as long everything takes here.
pub(crate) fn slower() -> u32 {
    std::env::var(SLOWER).map_or(1, |times| times.parse().unwrap())
}

/// Set where guests have another size than usual: their memory in MiB.
pub(crate) const GUEST_MB: &str = "THAW_TEST_GUEST_MB";

/// What guests have of memory here, in MiB.
pub(crate) fn guest_mb() -> u64 {
    std::env::var(GUEST_MB).map_or(256, |mb| mb.parse().unwrap())
}

/// Asks again and again until there is an answer; fails with `what` after `patience`.
pub(crate) fn wait_for<T>(what: &str, patience: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let (started, patience) = (Instant::now(), patience * slower());
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(
            started.elapsed() < patience,
            "{what}: not within {patience:?}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Prints the line that counts a test as skipped.
pub(crate) fn skip(test: &str, reason: &str) {
    println!("skipped: {test}: {reason}");
}
