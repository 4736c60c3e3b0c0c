//! `thaw snapshot inspect`: what a build holds, and what it costs.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use snapshot_format::Inspection;

use super::locate;

pub(super) fn inspect(dir: &Path, json: bool) -> Result<ExitCode> {
    let (store, id) = locate(dir)?;
    let inspection = Inspection::of(&store.open_cold(&id)?)?;
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
        "data        {} bytes on disk for {} of content, {:.2} times as much; reading all of it \
         reads {:.2} times as much",
        found.stored_bytes, found.live_bytes, found.space_amplification, found.read_amplification
    );
    if let Some(reason) = &found.merge {
        println!("merge       advised: {reason}");
    }
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
