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
    /// Compare two builds, page by page. The exit status is 0 if they are the same, 1 if not.
    Diff {
        /// The directory of the build that is compared to.
        from: PathBuf,
        /// The directory of the build that is looked at.
        to: PathBuf,
        /// As JSON, with the pages that changed.
        #[arg(long)]
        json: bool,
    },
    /// Rewrite a build and all it refers to as one build without ancestors, in the same store. An
    /// interrupted merge goes on when it is called again.
    Merge {
        /// The directory of the build whose memory is merged; it stays as it is.
        dir: PathBuf,
        /// The id of the merged build, 32 hexadecimal digits; by default that of an unfinished
        /// merge of the same build, or a new one.
        #[arg(long, value_name = "ID")]
        into: Option<snapshot_format::BuildId>,
        /// How the merged build is stored. Any but `none` makes a build that has to be merged
        /// back before it can be resumed.
        #[arg(long, value_enum, default_value_t = Compression::None)]
        compress: Compression,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write a build and all builds it needs as one tar stream.
    Export {
        /// Its directory.
        dir: PathBuf,
        /// Where to; standard output by default.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Verify and publish the builds of such a stream.
    Import {
        /// The directory of builds to import into.
        store: PathBuf,
        /// Where from; standard input by default.
        #[arg(long, short, value_name = "FILE")]
        input: Option<PathBuf>,
        /// The most that the files of all builds together may have, in MiB.
        #[arg(long, value_name = "MIB", default_value_t = 1 << 20)]
        max_mib: u64,
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

/// How a merged build is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Compression {
    /// As it is served.
    None,
    /// Fast to read again.
    Lz4,
    /// Small.
    Zstd,
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
