//! `/files`: whole files over plain HTTP, in and out.
//!
//! ```text
//! GET  ─▶ request (path, user) ─▶ download: range? gzip? ─▶ chunks from a thread, bounded
//! POST ─▶ request ─▶ upload: multi-part or one body, gzip? ─▶ replacement (hidden, then renamed)
//! POST /files/compose ─▶ replacement, filled from the sources inside the kernel
//! ```
//!
//! At most a few chunks of a file are in memory, whatever its size. A file is there completely or
//! not at all: a failed upload leaves what was there before.

mod compose;
mod content;
mod disposition;
mod download;
mod encoding;
mod range;
mod replacement;
pub(crate) mod request;
pub(crate) mod signature;
mod upload;

pub(crate) use compose::compose;
pub(crate) use download::download;
pub(crate) use upload::upload;

#[cfg(fuzzing)]
pub(crate) use disposition::file_name;
