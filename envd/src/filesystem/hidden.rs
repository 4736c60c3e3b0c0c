//! Names of files that are not complete yet. Watchers don't tell of them, and read from the name
//! what their last rename means.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::atomic::{AtomicU64, Ordering};

const CREATES: &str = ".envd-new-";
const REPLACES: &str = ".envd-old-";

/// What was under the final name when the hidden file was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Replaces {
    /// Nothing.
    Nothing,
    /// A file, which the hidden one will replace.
    File,
}

/// Sixteen digits that are unlikely to come again; no secret.
pub(super) fn random_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let random = RandomState::new().hash_one(COUNT.fetch_add(1, Ordering::Relaxed));
    format!("{random:016x}")
}

/// A new hidden name. One that is taken is an error of the file's creation.
pub(crate) fn name(replaces: Replaces) -> String {
    let prefix = match replaces {
        Replaces::Nothing => CREATES,
        Replaces::File => REPLACES,
    };
    format!("{prefix}{}", random_id())
}

/// What a name says, if it is a hidden one.
pub(crate) fn meaning(name: &str) -> Option<Replaces> {
    let digits = |rest: &str| rest.len() == 16 && rest.bytes().all(|b| b.is_ascii_hexdigit());
    if name.strip_prefix(CREATES).is_some_and(digits) {
        Some(Replaces::Nothing)
    } else if name.strip_prefix(REPLACES).is_some_and(digits) {
        Some(Replaces::File)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ_and_say_what_they_replace() {
        let (one, two) = (name(Replaces::Nothing), name(Replaces::File));
        assert_ne!(name(Replaces::Nothing), one);
        assert_eq!(meaning(&one), Some(Replaces::Nothing));
        assert_eq!(meaning(&two), Some(Replaces::File));
        assert_eq!(meaning(".envd-new-file"), None);
        assert_eq!(meaning("notes"), None);
    }
}
