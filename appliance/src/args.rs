//! What was typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

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
    /// Look at builds on disk.
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

/// `thaw snapshot …`
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Show what a build holds.
    Inspect {
        /// Its directory.
        dir: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read all of a build and compare it with its checksums.
    Verify {
        /// Its directory.
        dir: PathBuf,
        /// Also the builds it refers to.
        #[arg(long)]
        ancestors: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
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

/// `thaw engine`
#[derive(Debug, clap::Args)]
#[command(subcommand_negates_reqs = true, args_conflicts_with_subcommands = true)]
pub struct EngineArgs {
    /// Instead of a daemon's orders.
    #[command(subcommand)]
    pub command: Option<EngineCommand>,
    /// How the daemon starts it.
    #[command(flatten)]
    pub by_daemon: Option<DaemonEngineArgs>,
}

/// `thaw engine …`
#[derive(Debug, Subcommand)]
pub enum EngineCommand {
    /// Serve every VMM that hands its memory over at a socket, without a daemon.
    Serve(EngineServeArgs),
}

/// `thaw engine serve`
#[derive(Debug, clap::Args)]
pub struct EngineServeArgs {
    /// Where Firecracker hands memory over: the `backend_path` of its `snapshot/load`.
    #[arg(long)]
    pub socket: PathBuf,
    /// A memory file as Firecracker wrote it, or the directory of a build.
    #[arg(long, value_name = "FILE|DIR")]
    pub snapshot: PathBuf,
    /// CPUs to pin workers to, one each; one worker that isn't pinned when absent.
    #[arg(long, value_delimiter = ',')]
    pub cpus: Vec<usize>,
    /// How long a worker asks for the next fault before it waits in the kernel.
    #[arg(long, value_name = "US", default_value_t = 0)]
    pub spin_us: u64,
}

/// `thaw engine` as the daemon starts it.
#[derive(Debug, clap::Args)]
pub struct DaemonEngineArgs {
    /// NUMA node.
    #[arg(long, hide = true)]
    pub node: u32,
    /// CPUs to pin workers to.
    #[arg(long, value_delimiter = ',', hide = true)]
    pub cpus: Vec<usize>,
    /// Pages installed around a fault.
    #[arg(long, hide = true)]
    pub window_pages: u64,
    /// Page reads in flight per worker.
    #[arg(long, hide = true)]
    pub read_slots: usize,
}
