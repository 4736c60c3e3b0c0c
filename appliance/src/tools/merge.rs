//! `thaw snapshot merge`: a chain rewritten as one build.

use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use serde_json::json;
use snapshot_format::{
    Build, BuildId, BuildStore, Encoding, MergeOptions, MergeOutcome, MergeProgress, PublishInfo,
};

use super::locate;
use super::progress::Progress;
use crate::args::Compression;
use crate::clock::new_build_id;

pub(super) fn merge(
    dir: &Path,
    into: Option<BuildId>,
    compress: Compression,
    json: bool,
) -> Result<ExitCode> {
    let (store, id) = locate(dir)?;
    let source = store.open_cold(&id)?;
    let into = match into {
        Some(into) => into,
        None => unfinished(&store, &source)?.unwrap_or_else(new_build_id),
    };
    let options = MergeOptions {
        encoding: match compress {
            Compression::None => Encoding::Raw,
            Compression::Lz4 => Encoding::Lz4,
            Compression::Zstd => Encoding::Zstd,
        },
        ..MergeOptions::default()
    };
    let mut progress = Progress::default();
    let merged = store.merge(&source, into, info(&source), &options, &mut |step| {
        progress.show(
            &format_args!("merging into {into}"),
            step.written.get(),
            step.total.get(),
        );
        ControlFlow::Continue(())
    });
    progress.clear();
    let MergeOutcome::Published(published, step) = merged? else {
        bail!("The merge into {into} has stopped; call it again to go on");
    };
    report(&source, into, &published.dir, step, json)
}

/// What the source says about itself, at a new time.
fn info(source: &Build) -> PublishInfo {
    let manifest = source.manifest();
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    PublishInfo {
        created_at_ms: now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX)),
        vmm: manifest.vmm.clone(),
        labels: manifest.labels.clone(),
    }
}

fn unfinished(store: &BuildStore, source: &Build) -> Result<Option<BuildId>> {
    let unfinished = store.unfinished_merges()?;
    let of_this = |(_, from): &&(BuildId, Option<BuildId>)| *from == Some(source.id());
    Ok(unfinished.iter().find(of_this).map(|(into, _)| *into))
}

fn report(
    source: &Build,
    into: BuildId,
    dir: &Path,
    step: MergeProgress,
    json: bool,
) -> Result<ExitCode> {
    if json {
        let report = json!({
            "source": source.id(),
            "build": into,
            "dir": dir,
            "builds_merged": source.map().builds().len(),
            "pages": step.total,
            "pages_resumed": step.resumed,
            "bytes_read": step.bytes_read,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!(
            "{} builds merged into {into}: {} pages, {} of them by an earlier attempt",
            source.map().builds().len(),
            step.total,
            step.resumed
        );
        println!("{}", dir.display());
    }
    Ok(ExitCode::SUCCESS)
}
