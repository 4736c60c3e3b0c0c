//! What the command line does without the daemon: `thaw snapshot` and `thaw token`.

mod about;
mod diff;
mod inspect;
mod merge;
mod progress;
mod token;
mod transfer;
mod verify;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use snapshot_format::{BuildId, BuildStore};

use crate::args::SnapshotCommand;
use crate::cli;

pub use about::{completions, man, openapi};
pub use token::token;

/// Runs one of them.
///
/// # Errors
/// The directory is no build, or can't be read.
pub fn snapshot(command: SnapshotCommand) -> Result<ExitCode> {
    match command {
        SnapshotCommand::Create(args) => cli::run(cli::snapshot(&args)),
        SnapshotCommand::Ls(at) => cli::run(cli::snapshots(&at)),
        SnapshotCommand::Rm { name, at } => cli::run(cli::remove_snapshot(&at, &name)),
        SnapshotCommand::Inspect { dir, json } => inspect::inspect(&dir, json),
        SnapshotCommand::Diff { from, to, json } => diff::diff(&from, &to, json),
        SnapshotCommand::Merge {
            dir,
            into,
            compress,
            json,
        } => merge::merge(&dir, into, compress, json),
        SnapshotCommand::Export { dir, output } => transfer::export(&dir, output.as_deref()),
        SnapshotCommand::Import {
            store,
            input,
            max_mib,
            json,
        } => transfer::import(&store, input.as_deref(), max_mib, json),
        SnapshotCommand::Verify {
            dir,
            ancestors,
            json,
        } => verify::verify(&dir, ancestors, json),
    }
}

/// A build's directory is named by its id and lies in its store.
fn locate(dir: &Path) -> Result<(BuildStore, BuildId)> {
    let dir = dir
        .canonicalize()
        .with_context(|| format!("{} is not there; name a build's directory", dir.display()))?;
    let name = dir
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let id = name.parse().with_context(|| {
        format!(
            "{} is no build: its name is not a build id (32 hexadecimal digits)",
            dir.display()
        )
    })?;
    let root = dir.parent().unwrap_or(Path::new("/"));
    Ok((BuildStore::open_or_create(root)?, id))
}
