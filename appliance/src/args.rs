//! What was typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use snapshot_format::PageSize;

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

/// `thaw ls`
#[derive(Debug, clap::Args)]
pub struct LsArgs {
    /// Only in these states, with commas between them.
    #[arg(long)]
    pub state: Option<String>,
    /// Only with this label; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<String>,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
}

/// What becomes of a sandbox whose time is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnTimeout {
    /// It is removed.
    Kill,
    /// It is paused.
    Pause,
}

impl OnTimeout {
    /// As the API calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Pause => "pause",
        }
    }
}

/// `KEY=VALUE`.
fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("KEY=VALUE is needed")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// `thaw create`
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// What to start from.
    pub template: String,
    /// The id to give it.
    #[arg(long)]
    pub id: Option<String>,
    /// Virtual CPUs.
    #[arg(long)]
    pub vcpus: Option<u32>,
    /// Memory in MiB.
    #[arg(long, value_name = "MIB")]
    pub memory_mb: Option<u32>,
    /// Give it memory of huge pages.
    #[arg(long)]
    pub huge_pages: bool,
    /// Environment of its processes; may be repeated.
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = pair)]
    pub env: Vec<(String, String)>,
    /// A note; may be repeated.
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = pair)]
    pub label: Vec<(String, String)>,
    /// How long it may run, in seconds.
    #[arg(long, value_name = "SECONDS")]
    pub timeout_s: Option<u64>,
    /// What becomes of it then.
    #[arg(long, value_enum, default_value_t = OnTimeout::Kill)]
    pub on_timeout: OnTimeout,
    /// Let traffic bring it back while it is paused.
    #[arg(long)]
    pub auto_resume: bool,
    /// Let it reach nothing outside.
    #[arg(long)]
    pub no_internet: bool,
    /// How much it may read and write a second on its disk, in MiB.
    #[arg(long)]
    pub disk_mib_per_s: Option<u64>,
    /// How often it may.
    #[arg(long)]
    pub disk_ops_per_s: Option<u64>,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
}

/// `thaw exec`
#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// The sandbox.
    pub id: String,
    /// Who runs it.
    #[arg(long, short)]
    pub user: Option<String>,
    /// Where.
    #[arg(long, short = 'C')]
    pub cwd: Option<String>,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// `thaw shell`
#[derive(Debug, clap::Args)]
pub struct ShellArgs {
    /// The sandbox.
    pub id: String,
    /// Who.
    #[arg(long, short)]
    pub user: Option<String>,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
    /// Something other than the shell.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// Commands on one sandbox.
#[derive(Debug, clap::Args)]
pub struct One {
    /// The sandbox.
    pub id: String,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
}

/// `thaw resume`
#[derive(Debug, clap::Args)]
pub struct ResumeArgs {
    /// The sandbox.
    pub id: String,
    /// How long it may run from now on, in seconds; what it had left when absent.
    #[arg(long, value_name = "SECONDS")]
    pub timeout_s: Option<u64>,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
}

/// `thaw fork`
#[derive(Debug, clap::Args)]
pub struct ForkArgs {
    /// The sandbox.
    pub id: String,
    /// How many.
    #[arg(long, short = 'n', default_value_t = 1)]
    pub count: u32,
    /// How long each may run, in seconds.
    #[arg(long, value_name = "SECONDS")]
    pub timeout_s: Option<u64>,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
}

/// `thaw snapshot create`
#[derive(Debug, clap::Args)]
pub struct NewSnapshotArgs {
    /// The sandbox, which goes on.
    pub sandbox: String,
    /// The template's name; one is made up when absent.
    #[arg(long)]
    pub name: Option<String>,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
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

/// `thaw snapshot …`
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Make a template of a sandbox, and print its name.
    Create(NewSnapshotArgs),
    /// List templates.
    Ls(At),
    /// Remove a template. Sandboxes made of it stay.
    Rm {
        /// Its name.
        name: String,
        /// Which daemon.
        #[command(flatten)]
        at: At,
    },
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
    /// The size of the guests' pages in a memory file, as Firecracker's `huge_pages` was: 4K or 2M.
    #[arg(long, value_name = "SIZE", value_parser = page_size)]
    pub page_size: Option<PageSize>,
    /// CPUs to pin workers to, one each; one worker that isn't pinned when absent.
    #[arg(long, value_delimiter = ',')]
    pub cpus: Vec<usize>,
    /// How long a worker asks for the next fault before it waits in the kernel.
    #[arg(long, value_name = "US", default_value_t = 0)]
    pub spin_us: u64,
}

fn page_size(text: &str) -> Result<PageSize, String> {
    match text {
        "4K" => Ok(PageSize::Size4K),
        "2M" => Ok(PageSize::Size2M),
        _ => Err("4K or 2M".to_owned()),
    }
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
    /// How long a worker asks for the next fault before it waits.
    #[arg(long, hide = true, default_value_t = 0)]
    pub spin_us: u64,
    /// Sessions stay with the worker beside which their vCPUs are pinned.
    #[arg(long, hide = true)]
    pub keep_placement: bool,
}
