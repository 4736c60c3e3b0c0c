//! `bench -- envd`: the guest's daemon against doing the same without it, on this machine.
//!
//! Commands against a bare fork, exec and wait; uploads and downloads against `cp` of the same
//! bytes; each pair interleaved. And what the daemon costs while nobody wants anything from it.

mod client;
mod commands;
mod files;
mod idle;

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use self::client::Daemon;
use self::idle::Idle;
use crate::host::Host;
use crate::report::latency::Percentiles;
use crate::report::ratio::median;

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The daemon; the one beside this binary by default.
    #[arg(long, value_name = "FILE")]
    envd: Option<PathBuf>,
    /// Commands of each kind.
    #[arg(long, value_name = "N", default_value_t = 300)]
    commands: usize,
    /// Size of the file.
    #[arg(long, value_name = "N", default_value_t = 256)]
    mib: u64,
    /// How often it is copied in each way.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Where the file is; beside this binary by default.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Also write the report to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What came out.
#[derive(Debug, Serialize)]
struct Report {
    bench: &'static str,
    host: Host,
    envd_bytes: u64,
    commands: Vec<Pair>,
    files: Files,
    idle: Idle,
}

/// One kind of command, both ways; closed loop, warm.
#[derive(Debug, Serialize)]
struct Pair {
    command: String,
    bare_us: Percentiles,
    envd_us: Percentiles,
    /// Of the medians.
    ratio: f64,
}

/// Seconds per copy, and the median of the rounds' quotients by `cp`.
#[derive(Debug, Serialize)]
struct Files {
    mib: u64,
    cp_s: Vec<f64>,
    upload_s: Vec<f64>,
    download_s: Vec<f64>,
    upload_ratio: f64,
    download_ratio: f64,
    peak_rss_kib: u64,
}

/// Runs all of it and prints the report.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(
        args.commands > 0 && args.rounds > 0 && args.mib > 0,
        "Counts must be at least 1"
    );
    let here = std::env::current_exe().context("Finding the directory of this binary")?;
    let here = here.parent().context("This binary is in no directory")?;
    let envd = args.envd.clone().unwrap_or_else(|| here.join("envd"));
    let size = std::fs::metadata(&envd)
        .with_context(|| {
            format!(
                "Finding {}; build it, or name it with --envd",
                envd.display()
            )
        })?
        .len();
    let dir =
        tempfile::tempdir_in(args.dir.as_deref().unwrap_or(here)).context("Making a directory")?;
    let idle = idle::measure(&Daemon::start(&envd)?)?;
    let daemon = Daemon::start(&envd)?;
    let commands = commands::measure(&daemon, args.commands)?;
    let files = files::measure(&daemon, dir.path(), args.mib, args.rounds)?;
    let report = Report {
        bench: "envd",
        host: Host::describe(dir.path())?,
        envd_bytes: size,
        commands,
        files,
        idle,
    };
    print!("{report}");
    if let Some(path) = &args.json {
        let mut text = serde_json::to_string_pretty(&report)?;
        text.push('\n');
        std::fs::write(path, text).with_context(|| format!("Writing {}", path.display()))?;
    }
    Ok(())
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (host, files, idle) = (&self.host, &self.files, &self.idle);
        let commit = host.commit.as_deref().unwrap_or("unknown");
        writeln!(f, "envd: closed loop, warm, one client on loopback")?;
        writeln!(f, "  commit   {commit}; envd has {} bytes", self.envd_bytes)?;
        let Host {
            cpu,
            cpus,
            kernel,
            filesystem,
            ..
        } = host;
        writeln!(
            f,
            "  host     {cpu}, {cpus} CPUs, Linux {kernel}; files on {filesystem}"
        )?;
        writeln!(
            f,
            "\n  one command, µs{:23}count      p50      p90      p99    p99.9       max",
            ""
        )?;
        for pair in &self.commands {
            for (way, us) in [("bare", pair.bare_us), ("envd", pair.envd_us)] {
                writeln!(
                    f,
                    "  {:31}{way:5}{:>7}{:>9.1}{:>9.1}{:>9.1}{:>9.1}{:>10.1}",
                    pair.command, us.count, us.p50, us.p90, us.p99, us.p99_9, us.max
                )?;
            }
            writeln!(f, "  {:31}p50 of envd/bare: {:.3}", "", pair.ratio)?;
        }
        writeln!(
            f,
            "\n  {} MiB, median of {} rounds",
            files.mib,
            files.cp_s.len()
        )?;
        for (way, seconds, ratio) in [
            ("cp", &files.cp_s, 1.0),
            ("upload", &files.upload_s, files.upload_ratio),
            ("download", &files.download_s, files.download_ratio),
        ] {
            let seconds = median(seconds);
            let speed = files.mib as f64 / seconds;
            writeln!(
                f,
                "  {way:10}{seconds:>8.3} s{speed:>8.0} MiB/s   time/cp: {ratio:.3}"
            )?;
        }
        writeln!(f, "  peak of envd's memory: {} KiB", files.peak_rss_kib)?;
        writeln!(
            f,
            "\n  idle: {} KiB resident ({} KiB its own); within {} s: {} KiB touched, {} ticks of \
             CPU, {} wake-ups",
            idle.resident_kib,
            idle.own_kib,
            idle.seconds,
            idle.touched_kib,
            idle.cpu_ticks,
            idle.wakes
        )?;
        if !host.optimised {
            writeln!(f, "\n  Debug build: this is no measurement; use --release")?;
        }
        Ok(())
    }
}
