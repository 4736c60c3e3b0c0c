//! What a daemon costs that nobody talks to: memory, of which a snapshot stores what is touched,
//! and processor time.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::client::Daemon;

const SECONDS: u64 = 5;

#[derive(Debug, Serialize)]
pub(super) struct Idle {
    pub(super) seconds: u64,
    pub(super) resident_kib: u64,
    /// Of those, not of its file.
    pub(super) own_kib: u64,
    /// Of those, used at all within the time.
    pub(super) touched_kib: u64,
    pub(super) cpu_ticks: u64,
    pub(super) wakes: u64,
}

pub(super) fn measure(daemon: &Daemon) -> Result<Idle> {
    // It has done something, and is at rest again.
    super::commands::measure(daemon, 1)?;
    std::thread::sleep(Duration::from_secs(1));
    let pid = daemon.pid();
    std::fs::write(format!("/proc/{pid}/clear_refs"), "1").context("Clearing referenced bits")?;
    let before = (ticks(pid)?, wakes(pid)?);
    std::thread::sleep(Duration::from_secs(SECONDS));
    Ok(Idle {
        seconds: SECONDS,
        resident_kib: field(pid, "smaps_rollup", "Rss")?,
        own_kib: field(pid, "smaps_rollup", "Anonymous")?,
        touched_kib: field(pid, "smaps_rollup", "Referenced")?,
        cpu_ticks: ticks(pid)? - before.0,
        wakes: wakes(pid)? - before.1,
    })
}

/// A number from one of a process's files: `Name: number kB`.
pub(super) fn field(pid: u32, file: &str, name: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/{file}");
    let text = std::fs::read_to_string(&path).with_context(|| format!("Reading {path}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next());
    number
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("No {name} in {path}"))
}

fn wakes(pid: u32) -> Result<u64> {
    Ok(field(pid, "status", "voluntary_ctxt_switches")?
        + field(pid, "status", "nonvoluntary_ctxt_switches")?)
}

fn ticks(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let times = fields.split(' ').skip(11).take(2);
    Ok(times.filter_map(|ticks| ticks.parse::<u64>().ok()).sum())
}
