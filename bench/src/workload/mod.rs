//! What is measured: ways of asking for pages, and of storing them.

pub(crate) mod ahead;
pub(crate) mod format;
pub(crate) mod page_fault;
