//! `cargo try`: builds the daemon and becomes it.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::workspace::Workspace;

/// Builds `thaw` and its preload library, then replaces this process by `thaw try`.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<ExitCode> {
    let mut build = workspace.cargo();
    build.args([
        "build",
        "--release",
        "-p",
        "appliance",
        "-p",
        "uffd-preload",
    ]);
    // cargo shows its own progress.
    let status = build.status().context("Starting cargo")?;
    if !status.success() {
        bail!("Building Thaw failed; the compiler's messages are above");
    }
    let thaw = workspace.target().join("release/thaw");
    let mut job = Command::new(&thaw);
    job.arg("try")
        .arg("--inputs")
        .arg(workspace.inputs())
        .args(arguments);
    // Returns only when it failed.
    Err(job.exec()).with_context(|| format!("Starting {}", thaw.display()))
}
