//! TLS of the daemon's listeners: whose certificate they show, and whose they ask for.
//!
//! ```text
//!   [tls] certificate, key ──▶ files ──────┐
//!   or nothing ──▶ authority ──▶ leaf ─────┴─▶ identity (looked at again every minute)
//!                                                 │
//!   [api] client_ca ──────────▶ server ◀──────────┘
//! ```
//!
//! Without files of the operator's, the daemon is its own authority: made once, kept in the data
//! directory, and trusted by whoever is given `ca.pem` from there. Its key signs nothing but the
//! host's own certificate, which can sign nothing at all.

mod authority;
mod files;
mod identity;
mod leaf;
mod server;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

pub use identity::Identity;
pub use server::{Clients, server};

/// Why there is no TLS.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file can't be read or written.
    #[error("{} can't be used", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file's content is not what it has to be.
    #[error("{} {problem}", path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong, and what would do.
        problem: String,
    },
    /// A certificate can't be made.
    #[error("Making a certificate for {names}")]
    Made {
        /// What it is for.
        names: String,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
    /// A listener can't be set up.
    #[error("Setting up TLS")]
    Server(#[source] Box<dyn std::error::Error + Send + Sync>),
}
