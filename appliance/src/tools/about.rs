//! What the program says of itself: completions, manual pages, the API's document.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::args::Args;

/// `thaw completions`
///
/// # Errors
/// Standard output can't be written.
pub fn completions(shell: clap_complete::Shell) -> Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "thaw", &mut text);
    std::io::stdout().write_all(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// `thaw man`
///
/// # Errors
/// The directory can't be made or written.
pub fn man(dir: &Path) -> Result<ExitCode> {
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(Args::command(), dir))
        .with_context(|| format!("Writing manual pages to {}", dir.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// `thaw openapi`
///
/// # Errors
/// Standard output can't be written.
pub fn openapi() -> Result<ExitCode> {
    let document = serde_json::to_string_pretty(&http_api::openapi())?;
    std::io::stdout().write_all(document.as_bytes())?;
    println!();
    Ok(ExitCode::SUCCESS)
}
