//! `image-build`: everything that `cargo try` and `cargo verify` need, made on the spot.
//!
//! ```text
//! packages ─▶ kernel ─┬─▶ initrd ─┐
//!     └─────▶ tools ──┤           ├─▶ inputs.json ─┬─▶ try:    build, become `thaw try`
//! cargo ────▶ envd ───┴─▶ root ───┘                └─▶ verify: format, lints, tests, docs
//! ```
//!
//! Everything lands in `<target>/inputs` and is made again only when what it is made from changes.
//!
//! *Architecture invariant:* nothing here knows how sandboxes work; it makes files and starts
//! programs. It has no C dependencies, so it compiles on a bare Rust toolchain.

mod cpio;
mod guest_daemon;
mod guest_root;
mod initrd;
mod inputs;
mod invocation;
mod job;
mod kernel;
mod modules;
mod packages;
mod progress;
mod report;
mod stamp;
mod tools;
mod verify;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use workspace::Workspace;

/// Prepares the guest's kernel and root, then runs the job or the checks.
#[derive(Debug, Parser)]
#[command(name = "image-build")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Make the guest's kernel, initial RAM disk and root, and nothing else.
    Inputs,
    /// Make the inputs, build Thaw, and run `thaw try` with the rest of the arguments.
    Try {
        /// Arguments of `thaw try`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Make the inputs, then check everything: format, lints, build, tests, docs.
    Verify,
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    inputs::prepare(&workspace)?;
    match task {
        Task::Inputs => {
            println!("{}", workspace.inputs().display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Try { arguments } => job::run(&workspace, &arguments),
        Task::Verify => verify::run(&workspace),
    }
}
