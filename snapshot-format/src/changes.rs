//! What a diff changes, decided page by page.
//!
//! The decision is a pure function of the page's new content and what the parent has there.
//! A page that is zero now is a change if the parent has content: were it left out, the old
//! content would come back.

use crate::extent::{Extent, Origin, push_merged};
use crate::units::{PageCount, PageIndex};

/// What happens to a page whose content a writer was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It is what the parent has: inherited.
    Drop,
    /// It is zero now.
    Zero,
    /// It has content of its own.
    Store,
}

/// Decides about a page; `parent` is `None` where the parent has zero memory.
pub(crate) fn decide(page: &[u8], parent: Option<&[u8]>) -> Decision {
    match parent {
        Some(content) if content == page => Decision::Drop,
        None if is_zero(page) => Decision::Drop,
        Some(_) if is_zero(page) => Decision::Zero,
        _ => Decision::Store,
    }
}

/// Whether every byte is zero.
fn is_zero(page: &[u8]) -> bool {
    static ZEROS: [u8; 4096] = [0; 4096];
    page.chunks(ZEROS.len())
        .all(|part| part == &ZEROS[..part.len()])
}

/// The changes of a diff, in ascending order, with their counts.
#[derive(Debug)]
pub(crate) struct Changes {
    own: Origin,
    extents: Vec<Extent>,
    pub(crate) stored: PageCount,
    pub(crate) zeroed: PageCount,
    pub(crate) dropped: PageCount,
}

impl Changes {
    /// No changes yet; stored pages will have the origin `own`.
    pub(crate) fn new(own: Origin) -> Self {
        Self {
            own,
            extents: Vec::new(),
            stored: PageCount::default(),
            zeroed: PageCount::default(),
            dropped: PageCount::default(),
        }
    }

    pub(crate) fn store(&mut self, start: PageIndex, pages: PageCount, storage: PageIndex) {
        let extent = Extent {
            start,
            pages,
            origin: self.own,
            storage,
        };
        push_merged(&mut self.extents, extent);
        self.stored = self.stored + pages;
    }

    pub(crate) fn zero(&mut self, start: PageIndex, pages: PageCount) {
        push_merged(&mut self.extents, Extent::zero(start..start + pages));
        self.zeroed = self.zeroed + pages;
    }

    pub(crate) fn drop_page(&mut self) {
        self.dropped = self.dropped + PageCount::new(1);
    }

    pub(crate) fn extents(&self) -> &[Extent] {
        &self.extents
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_page_over_content_becomes_zero() {
        assert_eq!(decide(&[0; 4096], Some(&[1; 4096])), Decision::Zero);
    }

    #[test]
    fn page_equal_to_the_parents_is_dropped() {
        assert_eq!(decide(&[1; 4096], Some(&[1; 4096])), Decision::Drop);
        assert_eq!(decide(&[0; 4096], None), Decision::Drop);
    }

    #[test]
    fn page_that_differs_in_its_last_byte_is_stored() {
        let mut page = [0; 4096];
        page[4095] = 1;
        assert_eq!(decide(&page, None), Decision::Store);
        assert_eq!(decide(&page, Some(&[0; 4096])), Decision::Store);
    }
}
