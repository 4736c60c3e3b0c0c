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
    /// Make, list and revoke the tokens that callers send.
    Token(TokenArgs),
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

/// `thaw token`
#[derive(Debug, clap::Args)]
pub struct TokenArgs {
    /// Configuration file: tokens are kept in its data_dir.
    #[arg(long, global = true, default_value = "/etc/thaw/thaw.toml")]
    pub config: PathBuf,
    /// As JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: TokenCommand,
}

/// `thaw token …`
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token and print it. It is shown this once; only its hash is kept. A daemon that runs
    /// knows it at once.
    Create {
        /// What to call it; a name is made up when absent.
        #[arg(long)]
        name: Option<String>,
        /// What it allows.
        #[arg(long, value_enum, default_value_t = TokenScope::Full)]
        scope: TokenScope,
    },
    /// Show the names of all tokens.
    List,
    /// Remove a token. A daemon that runs refuses it within a second.
    Revoke {
        /// Its name.
        name: String,
    },
}

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum TokenScope {
    /// Everything.
    Full,
    /// `GET /metrics` only.
    Metrics,
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
