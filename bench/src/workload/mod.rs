//! Ways of asking for pages.

pub(crate) mod page_fault;
