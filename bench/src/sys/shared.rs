//! A second mapping of a guest's memory.
#![expect(unsafe_code, reason = "memory that is mapped twice")]

use std::fs::File;
use std::io;

use memmap2::MmapMut;

/// Maps all of a memfd for writing.
pub(crate) fn map(ram: &File) -> io::Result<MmapMut> {
    // SAFETY: the file is a memfd of this process that nobody cuts. What the other mapping
    // writes is not looked at while a slice of this one lives.
    unsafe { MmapMut::map_mut(ram) }
}
