//! A read-only mapping of a file that nobody changes any more.
//!
//! Used for `memory.map` only, after its build was published. The pages are populated at once:
//! the whole file is validated next anyhow, and a lookup must not take a major fault later.

#![expect(
    unsafe_code,
    reason = "mapping a file is unsafe: another process may change it"
)]

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapOptions};

/// The bytes of a whole file.
#[derive(Debug)]
pub(crate) struct Mapping(Mmap);

impl Mapping {
    /// Maps and populates a file that is not empty.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        // SAFETY: a file of a published build is never written or truncated, only unlinked,
        // which leaves the mapping intact. `BuildStore` publishes by rename after the last write
        // and FORMAT.md ("Media assumptions") makes the store's directory private to the host's
        // daemon; foreign builds are copied into it first.
        unsafe { MmapOptions::new().populate().map(file) }.map(Self)
    }

    /// The content.
    #[inline]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}
