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
    /// Serve faults (started by the daemon).
    #[command(hide = true)]
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
pub struct EngineArgs {
    /// NUMA node.
    #[arg(long)]
    pub node: u32,
    /// CPUs to pin workers to.
    #[arg(long, value_delimiter = ',')]
    pub cpus: Vec<usize>,
    /// Pages installed around a fault.
    #[arg(long)]
    pub window_pages: u64,
    /// Page reads in flight per worker.
    #[arg(long)]
    pub read_slots: usize,
}
