//! `thaw snapshot diff`: what is different between two builds.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use snapshot_format::{Difference, DifferenceProgress};

use super::locate;
use super::progress::Progress;

/// Runs of changed pages that the text shows; JSON has all.
const SHOWN_RUNS: usize = 20;

pub(super) fn diff(from: &Path, to: &Path, json: bool) -> Result<ExitCode> {
    let open = |dir| -> Result<_> {
        let (store, id) = locate(dir)?;
        Ok(store.open_cold(&id)?)
    };
    let (from, to) = (open(from)?, open(to)?);
    let mut progress = Progress::default();
    let found = Difference::between(&from, &to, &mut |step: DifferenceProgress| {
        progress.show(&"comparing", step.done.get(), step.total.get());
    })?;
    progress.clear();
    if json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        print(&found);
    }
    Ok(ExitCode::from(u8::from(!found.is_none())))
}

fn print(found: &Difference) {
    println!("from        {}", found.from);
    println!("to          {}", found.to);
    println!(
        "memory      {} pages of {} bytes",
        found.memory_pages.get(),
        found.page_size.bytes()
    );
    for (name, pages) in [
        ("shared", found.shared_pages),
        ("equal", found.equal_pages),
        ("changed", found.changed_pages),
        ("to zero", found.became_zero_pages),
        ("from zero", found.became_content_pages),
    ] {
        println!("  {name:<10}{:>12}", pages.get());
    }
    for run in found.changed_runs.iter().take(SHOWN_RUNS) {
        println!("  changed from page {:#x}: {}", run.start.get(), run.pages);
    }
    let more = found.changed_runs.len().saturating_sub(SHOWN_RUNS) as u64;
    if more + found.changed_runs_omitted > 0 {
        println!(
            "  and {} further runs; --json lists them",
            more + found.changed_runs_omitted
        );
    }
    for file in &found.changed_files {
        println!("file        {file} differs");
    }
}
