//! The only place of this crate with `unsafe`: mapping a file.

mod mapping;

pub(crate) use mapping::Mapping;
