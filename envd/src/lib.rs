//! The guest's daemon, and the protocol it speaks.
//!
//! `envd` runs inside every sandbox, usually as PID 1, and answers on TCP [`protocol::PORT`]: it
//! starts processes for clients, takes the guest's settings from the host after every boot and
//! resume, and readies the guest for a snapshot.
//!
//! ```text
//! connections ─▶ routes ─▶ auth ─┬─▶ init ────▶ machine (clock, entropy, host name)
//!  (HTTP/1.1)                    ├─▶ prepare ─▶ machine (sync, page cache)
//!  (HTTP/1.1)                    ├─▶ filesystem::service ─▶ place (openat2), watch (inotify)
//!                                └─▶ process::service ─▶ table ─▶ children (fork, wait, signal)
//!                                                          └──── output ─▶ events ─▶ client
//! ```
//!
//! With `default-features = false` the crate is [`protocol`] alone: constants, serde types and the
//! Connect framing, for the host's side of the same wire.
//!
//! *Architecture invariant:* nothing here knows what runs on the host. A request says everything
//! that its answer depends on; the host's addresses, ids and policies are not ours.

pub mod protocol;

#[cfg(feature = "server")]
mod accounts;
#[cfg(feature = "server")]
mod auth;
#[cfg(feature = "server")]
mod boot;
#[cfg(feature = "server")]
mod caller;
#[cfg(feature = "server")]
mod connections;
#[cfg(feature = "server")]
pub mod daemon;
#[cfg(feature = "server")]
mod files;
#[cfg(feature = "server")]
mod filesystem;
#[cfg(feature = "server")]
mod freeze;
#[cfg(feature = "server")]
mod freezer;
#[cfg(feature = "server")]
mod init;
#[cfg(feature = "server")]
mod machine;
#[cfg(feature = "server")]
mod memory;
#[cfg(feature = "server")]
mod metrics;
#[cfg(feature = "server")]
mod open_files;
#[cfg(feature = "server")]
mod ports;
#[cfg(feature = "server")]
mod prepare;
#[cfg(feature = "server")]
mod process;
#[cfg(feature = "server")]
mod proto;
#[cfg(feature = "server")]
mod refusal;
#[cfg(feature = "server")]
mod routes;
#[cfg(feature = "server")]
mod settings;
#[cfg(feature = "server")]
mod sys;

/// Decoders of foreign bytes that are not part of the protocol, for the fuzz targets.
#[cfg(all(fuzzing, feature = "server"))]
pub mod fuzzing {
    /// The file name in a `Content-Disposition`.
    pub fn file_name(header: &[u8]) -> Option<String> {
        crate::files::file_name(header)
    }

    /// The absolute path that a text means to a user with that home.
    pub fn resolve(text: &str, home: &str) -> Option<String> {
        let path = crate::filesystem::path::GuestPath::resolve(text, home);
        path.ok().map(|path| path.to_string())
    }

    pub use crate::filesystem::fuzzing::{list, remove};
}
