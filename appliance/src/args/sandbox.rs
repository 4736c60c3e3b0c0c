//! Commands on sandboxes.

use super::At;

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
