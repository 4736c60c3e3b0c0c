//! `thaw snapshot`: builds seen from the command line.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use snapshot_format::{
    BuildId, BuildStore, Inspection, VerifyOptions, VerifyProgress, verify_with,
};

use crate::args::SnapshotCommand;

/// Runs one of them.
///
/// # Errors
/// The directory is no build, or can't be read.
pub fn snapshot(command: SnapshotCommand) -> Result<ExitCode> {
    match command {
        SnapshotCommand::Inspect { dir, json } => inspect(&dir, json),
        SnapshotCommand::Verify {
            dir,
            ancestors,
            json,
        } => verify(&dir, ancestors, json),
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

fn inspect(dir: &Path, json: bool) -> Result<ExitCode> {
    let (store, id) = locate(dir)?;
    let inspection = Inspection::of(&store.open(&id)?);
    if json {
        println!("{}", serde_json::to_string_pretty(&inspection)?);
    } else {
        print_table(&inspection);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_table(found: &Inspection) {
    let parent = found
        .parent
        .map_or_else(|| "none".to_owned(), |parent| parent.to_string());
    let share = |pages: u64| 100.0 * pages as f64 / found.memory_pages.get().max(1) as f64;
    println!("build       {}", found.build_id);
    println!("parent      {parent}");
    println!("generation  {}", found.generation.get());
    println!(
        "memory      {} pages of {} bytes",
        found.memory_pages.get(),
        found.page_size.bytes()
    );
    for (name, pages) in [
        ("zero", found.zero_pages),
        ("own", found.own_pages),
        ("inherited", found.inherited_pages),
    ] {
        println!(
            "  {name:<10}{:>12} {:>6.1} %",
            pages.get(),
            share(pages.get())
        );
    }
    println!(
        "extents     {} in {} bytes of map",
        found.extents, found.map_bytes
    );
    println!("files       {} bytes", found.total_bytes);
    println!(
        "\n{:<34}{:>11}{:>13}{:>13}{:>10}",
        "builds", "generation", "data pages", "referenced", "extents"
    );
    for build in &found.builds {
        println!(
            "{:<34}{:>11}{:>13}{:>13}{:>10}",
            build.build_id.to_string(),
            build.generation.get(),
            build.data_pages.get(),
            build.referenced_pages.get(),
            build.extents
        );
    }
}

fn verify(dir: &Path, ancestors: bool, json: bool) -> Result<ExitCode> {
    let (store, id) = locate(dir)?;
    let mut progress = Progress::default();
    let report = verify_with(&store, &id, VerifyOptions { ancestors }, &mut |step| {
        progress.show(&step);
    });
    progress.clear();
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        for fault in &report.faults {
            println!("{fault}");
        }
        let verdict = if report.is_clean() {
            "intact"
        } else {
            "DAMAGED"
        };
        println!(
            "build {id}: {verdict}, {} files, {} bytes read, {} faults",
            report.files,
            report.bytes,
            report.faults.len() as u64 + report.faults_omitted as u64
        );
    }
    Ok(if report.is_clean() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A line on a terminal, from two seconds on.
#[derive(Default)]
struct Progress {
    started: Option<Instant>,
    shown: bool,
}

impl Progress {
    fn show(&mut self, step: &VerifyProgress<'_>) {
        let started = *self.started.get_or_insert_with(Instant::now);
        if started.elapsed() < Duration::from_secs(2) || !std::io::stderr().is_terminal() {
            return;
        }
        self.shown = true;
        let percent = 100 * step.done / step.total.max(1);
        eprint!("\r{}: {percent} % ", step.file.display());
        let _ = std::io::stderr().flush();
    }

    fn clear(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}
