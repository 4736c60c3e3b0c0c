//! Preloading: reading all of the machine's memory once, so that after a lazy resume the pages come
//! before somebody waits for them.
//!
//! `POST /memory/preload` begins, `GET` tells how far it is, `DELETE` ends it. One runs at a time,
//! on a thread of its own at the lowest priority.

mod kcore;
mod preload;

pub(crate) use preload::{Preload, begin, cancel, status};
