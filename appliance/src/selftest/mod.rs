//! `thaw try`: a sandbox's whole life, played against a daemon of its own, with what each
//! step cost and whether anything was lost or left over.

mod daemon;
mod leftovers;
mod report;
mod scenario;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::args::TryArgs;
use daemon::{Daemon, Workplace};
use report::Report;

/// Plays it.
///
/// # Errors
/// It could not be played to the end; what was started is ended.
pub fn run(args: &TryArgs) -> Result<ExitCode> {
    let workplace = Workplace::new(args, &data_dir(args)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut report = Report::default();
    let played = runtime.block_on(async {
        let mut daemon = Daemon::start(&workplace).await?;
        report.time("start the daemon", daemon.took);
        let played = scenario::play(&daemon.client, args, &mut report).await;
        let stopped = daemon.stop().await;
        report.time(
            "stop the daemon",
            stopped.as_ref().copied().unwrap_or_default(),
        );
        match (played, stopped) {
            (Err(error), _) => Err(error),
            (Ok(()), stopped) => stopped.map(|_| ()).context("Stopping the daemon"),
        }
    });
    if let Err(error) = played {
        eprintln!("{}", workplace.log_tail());
        return Err(error.context(format!(
            "The trial broke off; the daemon's log is {}",
            workplace.log.display()
        )));
    }
    report.leftovers = leftovers::find(&workplace);
    report.print();
    if let Some(path) = &args.json {
        let json = serde_json::to_vec_pretty(&report)?;
        std::fs::write(path, json).with_context(|| format!("Writing {}", path.display()))?;
    }
    Ok(if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Always the same one: whatever a killed trial leaves, the next one's daemon cleans up.
fn data_dir(args: &TryArgs) -> Result<PathBuf> {
    if !args.inputs.is_dir() {
        bail!(
            "{} is no directory; `cargo try` prepares it and passes it here",
            args.inputs.display()
        );
    }
    let inputs = args.inputs.canonicalize()?;
    Ok(args
        .data_dir
        .clone()
        .unwrap_or_else(|| inputs.with_file_name("try")))
}
