//! What is measured: ways of asking for pages, of storing them, and what a sandbox needs beside
//! its memory.

pub(crate) mod ahead;
pub(crate) mod api;
pub(crate) mod disks;
pub(crate) mod format;
pub(crate) mod page_fault;
pub(crate) mod restore;
mod rounds;
pub(crate) mod slots;
