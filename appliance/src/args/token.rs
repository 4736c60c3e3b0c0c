//! `thaw token`

use std::path::PathBuf;

use clap::Subcommand;

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
