//! `thaw snapshot export` and `import`: builds from store to store.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde_json::json;
use snapshot_format::{BuildStore, ImportOptions};

use super::locate;
use super::progress::Progress;

/// Written at a time.
const BUFFER_BYTES: usize = 1 << 20;

pub(super) fn export(dir: &Path, output: Option<&Path>) -> Result<ExitCode> {
    let (store, id) = locate(dir)?;
    let mut progress = Progress::default();
    let mut show = |step: snapshot_format::ExportProgress| {
        progress.show(
            &format_args!("exporting {}", step.build),
            step.done,
            step.total,
        );
    };
    let summary = if let Some(path) = output {
        let file = File::create_new(path)
            .with_context(|| format!("Creating {}, which must not exist yet", path.display()))?;
        let written = store
            .export(
                &id,
                BufWriter::with_capacity(BUFFER_BYTES, &file),
                &mut show,
            )
            .map_err(anyhow::Error::from)
            .and_then(|summary| {
                let synced = file.sync_all();
                synced.with_context(|| format!("Syncing {}", path.display()))?;
                Ok(summary)
            });
        if written.is_err() {
            // Half a stream is of no use, and nobody else has it: it was made just now.
            let _ = std::fs::remove_file(path);
        }
        written?
    } else {
        let stdout = io::stdout().lock();
        if stdout.is_terminal() {
            bail!("The stream is binary; redirect it, or name a file with --output");
        }
        store.export(
            &id,
            BufWriter::with_capacity(BUFFER_BYTES, stdout),
            &mut show,
        )?
    };
    progress.clear();
    eprintln!(
        "{} builds and {} bytes exported, for build {id}",
        summary.builds.len(),
        summary.bytes
    );
    Ok(ExitCode::SUCCESS)
}

pub(super) fn import(
    store: &Path,
    input: Option<&Path>,
    max_mib: u64,
    json: bool,
) -> Result<ExitCode> {
    let store = BuildStore::open_or_create(store)?;
    let max_bytes = max_mib.saturating_mul(1 << 20);
    let options = ImportOptions { max_bytes };
    let (from, total): (Box<dyn Read>, u64) = match input {
        Some(path) => {
            let file = File::open(path).with_context(|| format!("Opening {}", path.display()))?;
            let total = file.metadata().map_or(0, |metadata| metadata.len());
            (Box::new(file), total)
        }
        None => (Box::new(io::stdin().lock()), 0),
    };
    let mut from = Counted {
        from,
        done: 0,
        total,
        progress: Progress::default(),
    };
    let imported = store.import(&mut from, &options);
    from.progress.clear();
    let summary = imported?;
    if json {
        let report = json!({
            "build": summary.build,
            "dir": store.path(&summary.build),
            "published": summary.published,
            "present": summary.present,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!(
            "{} builds imported, {} were there already",
            summary.published.len(),
            summary.present.len()
        );
        println!("{}", store.path(&summary.build).display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows how much of a stream was read.
struct Counted {
    from: Box<dyn Read>,
    done: u64,
    total: u64,
    progress: Progress,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.done += read as u64;
        self.progress.show(&"importing", self.done, self.total);
        Ok(read)
    }
}
