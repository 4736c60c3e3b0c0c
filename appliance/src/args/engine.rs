//! `thaw engine`

use std::path::PathBuf;

use clap::Subcommand;
use snapshot_format::PageSize;

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
