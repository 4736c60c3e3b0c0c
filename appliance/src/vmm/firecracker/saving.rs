//! How a stopped guest is saved: a decision that costs its memory where it is wrong.
//!
//! ```text
//!   guest        a state alone works   its list of pages in memory holds   otherwise
//!   booted       the list              the list                            all of it
//!   restored     the state             the list                            refused: all of it
//!                                                                          would be brought in
//! ```

use std::fs;

/// From this much on, memory is in two slots: the gap for devices lies between them.
/// Source: `MMIO32_MEM_START` in `src/vmm/src/arch/x86_64/layout.rs` of Firecracker 1.13 to 1.17.
const ONE_SLOT: u64 = 3 << 30;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Saving {
    /// The device state; the pages are read out of its process.
    State,
    /// The pages that it finds in memory.
    Resident,
    /// All pages.
    All,
}

/// Whether the pages that Firecracker finds in memory are all that a guest has, and end up in
/// their places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trust {
    /// It asks the kernel by a call that forgets what is in swap.
    pub(super) swap: bool,
    /// Pages of the second slot are written over those of the first, unless the last page of the
    /// first is in memory: an initial RAM disk lies there until the guest gives it back.
    pub(super) misplaces: bool,
}

impl Trust {
    /// As this host is now, which may get swap space at any time.
    pub(super) fn now(misplaces: bool) -> Self {
        Self {
            swap: has_swap(),
            misplaces,
        }
    }

    /// How a guest is saved whose memory was served or not.
    ///
    /// # Errors
    /// Why it can't be.
    pub(super) const fn saving(
        self,
        served: bool,
        state_only: bool,
        memory_bytes: u64,
    ) -> Result<Saving, &'static str> {
        let misplaced = self.misplaces && memory_bytes > ONE_SLOT;
        if served && state_only {
            return Ok(Saving::State);
        }
        match (served, self.swap || misplaced) {
            (_, false) => Ok(Saving::Resident),
            (false, true) => Ok(Saving::All),
            (true, true) if misplaced => Err(
                "this version writes no state by itself, and misplaces pages of more than 3 GiB",
            ),
            (true, true) => Err(
                "this version writes no state by itself, and with swap space on the host it may \
                 forget pages",
            ),
        }
    }
}

/// Whether this version misplaces pages.
/// Source: `CHANGELOG.md` of Firecracker 1.14.2 and 1.15.0, on diff snapshots with several slots.
pub(super) fn misplaces(version: &str) -> bool {
    let released = version.split('-').next();
    matches!(released, Some("1.14.0" | "1.14.1"))
}

fn has_swap() -> bool {
    // One line is the heading. Source: proc_swaps(5).
    fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: u64 = ONE_SLOT;
    const LARGE: u64 = ONE_SLOT + (2 << 20);

    fn trust(swap: bool, version: &str) -> Trust {
        Trust {
            swap,
            misplaces: misplaces(version),
        }
    }

    #[test]
    fn pages_in_memory_are_trusted_where_they_can_be() {
        let usual = trust(false, "1.16.1");
        assert_eq!(usual.saving(false, true, LARGE), Ok(Saving::Resident));
        assert_eq!(usual.saving(true, true, LARGE), Ok(Saving::State));
        assert_eq!(usual.saving(true, false, LARGE), Ok(Saving::Resident));
        let swapped = trust(true, "1.16.1");
        assert_eq!(swapped.saving(false, true, SMALL), Ok(Saving::All));
        assert_eq!(swapped.saving(true, true, SMALL), Ok(Saving::State));
        assert!(swapped.saving(true, false, SMALL).is_err());
    }

    #[test]
    fn versions_that_misplace_pages_write_all_of_a_large_guest() {
        for version in ["1.14.0", "1.14.1", "1.14.1-dev"] {
            let old = trust(false, version);
            assert_eq!(
                old.saving(false, true, SMALL),
                Ok(Saving::Resident),
                "{version}"
            );
            assert_eq!(old.saving(false, true, LARGE), Ok(Saving::All), "{version}");
            assert_eq!(
                old.saving(true, true, LARGE),
                Ok(Saving::State),
                "{version}"
            );
            assert!(
                old.saving(true, false, LARGE)
                    .unwrap_err()
                    .contains("misplaces")
            );
        }
        for version in ["1.13.2", "1.14.2", "1.14.10", "1.15.0"] {
            let right = trust(false, version);
            assert_eq!(
                right.saving(false, true, LARGE),
                Ok(Saving::Resident),
                "{version}"
            );
        }
    }
}
