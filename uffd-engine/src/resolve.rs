//! What to do about one fault: a pure function of the event, the page's state and
//! where its content lies. The worker carries it out and nothing else decides.
//!
//! Why a fault on an installed page is answered with a zero page: two events look
//! alike here. Either several vCPUs faulted on one page and the first answer already
//! served them all, or the page was dropped behind our back (a `REMOVE` that is not
//! read yet, or a hole punched in shared memory, which sends no event) and reads as
//! zero now. The kernel knows which: it refuses to install over a present page
//! (`EEXIST`), and then waking the waiters is all there is to do.
//!
//! A page that was never installed has the build's content, though a hole was punched there: who
//! gave it back and takes it again may find zeros or what it had left, and that is the build's.

use snapshot_format::{Extent, Origin};

use crate::page_state::PageState;
use crate::sys::uffd::FaultKind;

/// What one fault asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resolution {
    /// Install zeros; over a present page this only wakes.
    Zero,
    /// Install the content of this extent.
    Fill(Extent),
    /// A read of this page is under way; its completion answers this fault too.
    Await,
    /// The page is there: wake whoever waits.
    Wake,
    /// The guest writes to a page that was protected: it is dirty from now on.
    LetWrite,
}

/// Decides about one fault.
#[must_use]
pub(crate) fn resolve(kind: FaultKind, state: PageState, extent: Extent) -> Resolution {
    match kind {
        FaultKind::WriteProtect => return Resolution::LetWrite,
        // We never register for those; whoever did needs the page let go, not replaced.
        FaultKind::Minor => return Resolution::Wake,
        FaultKind::Read | FaultKind::Write => {}
    }
    match (state, extent.origin) {
        (PageState::Missing, Origin::Build(_)) => Resolution::Fill(extent),
        (PageState::Reading, _) => Resolution::Await,
        (PageState::Missing, Origin::Zero)
        | (PageState::Clean | PageState::Zero | PageState::Dirty | PageState::Removed, _) => {
            Resolution::Zero
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot_format::{PageCount, PageIndex};

    fn extent(origin: Origin) -> Extent {
        Extent {
            start: PageIndex::new(0),
            pages: PageCount::new(8),
            origin,
            storage: PageIndex::new(0),
        }
    }

    #[test]
    fn a_removed_page_comes_back_as_zero_not_as_the_snapshot() {
        let stored = extent(Origin::Build(0));
        for state in [
            PageState::Removed,
            PageState::Clean,
            PageState::Zero,
            PageState::Dirty,
        ] {
            assert_eq!(
                resolve(FaultKind::Read, state, stored),
                Resolution::Zero,
                "{state:?}"
            );
        }
    }

    #[test]
    fn a_missing_page_is_filled_from_where_the_map_says() {
        let stored = extent(Origin::Build(0));
        assert_eq!(
            resolve(FaultKind::Write, PageState::Missing, stored),
            Resolution::Fill(stored)
        );
        let zero = extent(Origin::Zero);
        assert_eq!(
            resolve(FaultKind::Read, PageState::Missing, zero),
            Resolution::Zero
        );
    }

    #[test]
    fn a_second_fault_on_a_page_being_read_waits_for_the_first() {
        let stored = extent(Origin::Build(0));
        assert_eq!(
            resolve(FaultKind::Read, PageState::Reading, stored),
            Resolution::Await
        );
    }
}
