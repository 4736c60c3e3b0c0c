//! What was typed.

mod engine;
mod sandbox;
mod snapshot;
mod token;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

pub use engine::{DaemonEngineArgs, EngineArgs, EngineCommand, EngineServeArgs};
pub use sandbox::{CreateArgs, ExecArgs, ForkArgs, LsArgs, OnTimeout, One, ResumeArgs, ShellArgs};
pub use snapshot::{Compression, NewSnapshotArgs, SnapshotCommand};
pub use token::{TokenArgs, TokenCommand, TokenScope};

/// Keeps paused microVMs on disk and brings them back in milliseconds.
#[derive(Debug, Parser)]
#[command(name = "thaw", version, about)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// All commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon.
    Serve {
        /// Configuration file.
        #[arg(long, default_value = "/etc/thaw/thaw.toml")]
        config: PathBuf,
    },
    /// Check a configuration file and say what is wrong with it.
    CheckConfig {
        /// Configuration file.
        #[arg(default_value = "/etc/thaw/thaw.toml")]
        config: PathBuf,
    },
    /// List sandboxes.
    Ls(LsArgs),
    /// Create a sandbox and print its id.
    Create(CreateArgs),
    /// Run a command in a sandbox; its exit status becomes this program's.
    Exec(ExecArgs),
    /// Open a terminal in a sandbox.
    Shell(ShellArgs),
    /// Write a sandbox to disk and end its process.
    Pause(One),
    /// Bring a sandbox back.
    Resume(ResumeArgs),
    /// Make running copies of a sandbox and print their ids.
    Fork(ForkArgs),
    /// Remove sandboxes.
    Rm {
        /// Their ids.
        #[arg(required = true)]
        ids: Vec<String>,
        /// Which daemon.
        #[command(flatten)]
        at: At,
    },
    /// Show what the memory of running sandboxes does, live.
    Top(TopArgs),
    /// Print what happens, as it happens.
    Events(EventsArgs),
    /// Show what the host is, has and does.
    Host(HostArgs),
    /// Take no new work and pause all that runs.
    Drain {
        /// Take work again.
        #[arg(long)]
        undo: bool,
        /// Which daemon.
        #[command(flatten)]
        at: At,
    },
    /// Print the API as an OpenAPI document.
    Openapi,
    /// Print what makes a shell complete these commands.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a directory.
    Man {
        /// The directory, which is made if need be.
        dir: PathBuf,
    },
    /// Make, list and revoke the tokens that callers send.
    Token(TokenArgs),
    /// Make, list and remove templates of sandboxes, and look at builds on disk.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Play a sandbox's whole life on this machine and show what it cost.
    Try(TryArgs),
    /// Serve the page faults of VMMs.
    Engine(EngineArgs),
    /// Become a VMM (started by the daemon).
    #[command(hide = true)]
    Launch,
}

/// Which daemon, and how its answer is printed.
#[derive(Clone, Debug, clap::Args)]
pub struct At {
    /// The daemon's Unix socket.
    #[arg(long, env = "THAW_SOCKET", default_value = "/run/thaw/api.sock")]
    pub socket: PathBuf,
    /// Another host's daemon instead, as https://host:port.
    #[arg(long, env = "THAW_URL")]
    pub url: Option<String>,
    /// The authority of that host's certificate; those that this machine trusts when absent.
    #[arg(long, env = "THAW_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// A certificate that lets this client in, and
    #[arg(long, env = "THAW_CERT", value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// its key.
    #[arg(long, env = "THAW_KEY", value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// A token that does.
    #[arg(long, env = "THAW_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
}

/// `thaw top`
#[derive(Debug, clap::Args)]
pub struct TopArgs {
    /// How often, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    pub interval_ms: u64,
    /// Look once and end, as when standard output is no terminal.
    #[arg(long)]
    pub once: bool,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
}

/// `thaw events`
#[derive(Debug, clap::Args)]
pub struct EventsArgs {
    /// Those after this one first, instead of from now on.
    #[arg(long, value_name = "ID")]
    pub after: Option<u64>,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
}

/// `thaw host`
#[derive(Debug, clap::Args)]
pub struct HostArgs {
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
}

/// `thaw try`
#[derive(Debug, clap::Args)]
pub struct TryArgs {
    /// Directory with vmlinuz, initrd.img and base.ext4.
    #[arg(long)]
    pub inputs: PathBuf,
    /// Directory for the daemon's data; emptied afterwards. A temporary one when absent.
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Write the result as JSON, too.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Memory of the guest in MiB.
    #[arg(long, default_value_t = 512)]
    pub memory_mb: u32,
    /// Random data that the guest keeps in memory, in MiB.
    #[arg(long, default_value_t = 64)]
    pub fill_mb: u32,
}
