//! `thaw snapshot verify`: every byte of a build against its checksums.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use snapshot_format::{VerifyOptions, verify_with};

use super::locate;
use super::progress::Progress;

pub(super) fn verify(dir: &Path, ancestors: bool, json: bool) -> Result<ExitCode> {
    let (store, id) = locate(dir)?;
    let mut progress = Progress::default();
    let report = verify_with(&store, &id, VerifyOptions { ancestors }, &mut |step| {
        progress.show(&step.file.display(), step.done, step.total);
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
