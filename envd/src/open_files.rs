//! How many files the daemon may have open: as many as the kernel lets it, for hundreds of commands
//! at a time. Processes get the limit that we got, because some go through all possible numbers.

use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What we were started with.
static INHERITED: OnceLock<Rlimit> = OnceLock::new();
/// Enough; the hard limit may be a billion.
const WANTED: u64 = 65_536;

/// Raises our own limit; a failure leaves it as it is.
pub(crate) fn raise() {
    let inherited = *INHERITED.get_or_init(|| getrlimit(Resource::Nofile));
    let wanted = inherited.maximum.map_or(WANTED, |most| most.min(WANTED));
    if inherited.current.is_some_and(|now| now < wanted) {
        let raised = Rlimit {
            current: Some(wanted),
            maximum: inherited.maximum,
        };
        let _ = setrlimit(Resource::Nofile, raised);
    }
}

/// What processes are to have; `None` when it wasn't changed.
pub(crate) fn inherited() -> Option<Rlimit> {
    INHERITED.get().copied()
}
