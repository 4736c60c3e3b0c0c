//! Everything of this crate that needs `unsafe`: one file per kernel interface.
//!
//! Each wrapper turns errno into meaning and owns the descriptors it makes, so
//! that nothing above this module handles a raw fd or a raw errno.

pub mod fdpass;
pub mod guest_memory;
pub mod mapping;
pub mod memfd_copy;
pub mod pagemap;
pub mod process;
pub mod ring;
pub mod state_map;
pub mod uffd;
mod uffd_abi;
