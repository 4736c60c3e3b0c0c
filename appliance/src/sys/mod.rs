//! Everything of this crate that needs `unsafe`: kernel interfaces without a safe wrapper.

pub mod device_mapper;
pub mod loop_device;
pub mod mount_namespace;
pub mod pidfd_info;
pub mod readiness;
pub mod reflink;
pub mod ring_copy;
pub mod spawn;
pub mod tap;
pub mod terminal;
