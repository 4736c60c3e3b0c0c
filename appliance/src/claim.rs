//! One daemon per data directory, per run directory and per instance name: whoever comes
//! second is told so before it touches anything of the first.
//!
//! Recovery ends every process in a namespace of our name and every engine in our run
//! directory; that is right only while nobody else is there. The claims are the kernel's
//! (locks on the directories, a name of an abstract socket), so they end with the process,
//! however it ends, and no child inherits them.

use std::fs::File;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;

use crate::config::Config;

/// Why something can't be claimed.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// Another daemon uses the directory.
    #[error("Another daemon uses {}; stop it, or set {key}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// The key of the configuration that names it.
        key: &'static str,
    },
    /// Another daemon has the name.
    #[error("Another daemon is called {name:?}; stop it, or set instance")]
    Instance {
        /// The name.
        name: String,
    },
    /// The kernel refused.
    #[error("Claiming {what}")]
    Io {
        /// What was to be claimed.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What only this daemon uses while this lives.
#[derive(Debug)]
pub struct Claim {
    _data: Flock<File>,
    _run: Flock<File>,
    _instance: UnixListener,
}

impl Claim {
    /// Claims both directories, which have to be there, and the name.
    ///
    /// # Errors
    /// See [`ClaimError`]; nothing is claimed.
    pub fn take(config: &Config) -> Result<Self, ClaimError> {
        Ok(Self {
            _data: lock(&config.data_dir, "data_dir")?,
            _run: lock(&config.run_dir, "run_dir")?,
            _instance: name(&config.instance)?,
        })
    }
}

fn lock(path: &Path, key: &'static str) -> Result<Flock<File>, ClaimError> {
    let failed = |source| ClaimError::Io {
        what: path.display().to_string(),
        source,
    };
    let dir = File::open(path).map_err(failed)?;
    Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        nix::Error::EWOULDBLOCK => ClaimError::Directory {
            path: path.to_owned(),
            key,
        },
        error => failed(error.into()),
    })
}

/// Abstract names belong to a network namespace, as the links that carry this name do.
fn name(instance: &str) -> Result<UnixListener, ClaimError> {
    let claimed = SocketAddr::from_abstract_name(format!("thaw-instance-{instance}"))
        .and_then(|address| UnixListener::bind_addr(&address));
    claimed.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ClaimError::Instance {
            name: instance.to_owned(),
        },
        _ => ClaimError::Io {
            what: format!("the name {instance:?}"),
            source,
        },
    })
}
