//! The machine's huge pages, lent to one test at a time.

use std::fs::{self, File};

const OVERCOMMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";
const BYTES: u64 = 2 << 20;

/// Pages of 2 MiB that the kernel may make when they are needed, for as long as this lives.
pub(crate) struct Allowed {
    before: String,
    _turn: File,
}

/// The test's turn: nobody else changes what is allowed.
pub(crate) fn turn() -> Result<File, String> {
    let turn = File::open(OVERCOMMIT).map_err(|error| format!("no huge pages: {error}"))?;
    turn.lock().map_err(|error| format!("no turn: {error}"))?;
    Ok(turn)
}

impl Allowed {
    /// So many MiB of them; why there are none.
    pub(crate) fn mib(turn: File, mib: u64) -> Result<Self, String> {
        let failed = |error| format!("huge pages can't be allowed: {error}");
        let before = fs::read_to_string(OVERCOMMIT).map_err(failed)?;
        let pages = (mib << 20) / BYTES;
        let allowed = before.trim().parse::<u64>().unwrap() + pages;
        fs::write(OVERCOMMIT, allowed.to_string()).map_err(failed)?;
        Ok(Self {
            before,
            _turn: turn,
        })
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        let _ = fs::write(OVERCOMMIT, self.before.trim());
    }
}
