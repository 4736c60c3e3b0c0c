//! The only unsafe code of this crate: what the floors do to the kernel.

pub(crate) mod copy_page;
pub(crate) mod page_source;
pub(crate) mod shared;
