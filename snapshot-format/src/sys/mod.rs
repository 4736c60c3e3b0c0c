//! The only place of this crate with `unsafe`: mapping a file, code for this very CPU, and a system
//! call.

mod mapping;
mod widest;
mod writeback;

pub(crate) use mapping::Mapping;
pub(crate) use widest::Cpu;
pub(crate) use writeback::start_writeback;
