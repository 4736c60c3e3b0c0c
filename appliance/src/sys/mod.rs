//! Everything of this crate that needs `unsafe`: kernel interfaces without a safe wrapper.

pub mod readiness;
pub mod reflink;
pub mod tap;
pub mod terminal;
