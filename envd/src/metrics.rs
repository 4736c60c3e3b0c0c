//! `GET /metrics` and `GET /envs`: how the guest does, and its environment.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use rustix::fs::statvfs;
use serde::Serialize;

use crate::refusal::{Refusal, json};
use crate::routes::Guest;

/// The processors' times when they were last asked for.
#[derive(Debug, Default)]
pub(crate) struct Cpu(Mutex<Times>);

/// In ticks since the machine started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Times {
    busy: u64,
    all: u64,
}

/// The answer; sizes in bytes. Source: E2B's envd (0.6.4).
#[derive(Debug, Serialize)]
struct Metrics {
    /// Seconds since 1970.
    ts: u64,
    cpu_count: usize,
    /// Since the last time somebody asked, of all processors together.
    cpu_used_pct: f64,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    mem_total_mib: u64,
    mem_used_mib: u64,
    disk_used: u64,
    disk_total: u64,
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(guest): State<Arc<Guest>>) -> Result<Response, Refusal> {
    let metrics = measure(&guest.cpu).map_err(|e| Refusal::failed("Reading /proc", &e))?;
    Ok(json(StatusCode::OK, &metrics))
}

/// `GET /envs`: what `/init` has set.
pub(crate) async fn environment(State(guest): State<Arc<Guest>>) -> Response {
    let environment: BTreeMap<String, String> = guest.settings.lock().environment.clone();
    json(StatusCode::OK, &environment)
}

fn measure(cpu: &Cpu) -> io::Result<Metrics> {
    let now = times(&std::fs::read_to_string("/proc/stat")?);
    let before = std::mem::replace(
        &mut *cpu.0.lock().unwrap_or_else(PoisonError::into_inner),
        now,
    );
    let memory = std::fs::read_to_string("/proc/meminfo")?;
    let bytes = |name: &str| field(&memory, name).unwrap_or(0) * 1024;
    let (total, free) = (bytes("MemTotal"), bytes("MemFree"));
    let cache = bytes("Cached") + bytes("Buffers") + bytes("SReclaimable");
    let used = total.saturating_sub(free).saturating_sub(cache);
    let disk = statvfs("/")?;
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(Metrics {
        ts: since_1970.unwrap_or_default().as_secs(),
        cpu_count: std::thread::available_parallelism().map_or(1, usize::from),
        cpu_used_pct: used_percent(before, now),
        mem_total: total,
        mem_used: used,
        mem_cache: cache,
        mem_total_mib: total >> 20,
        mem_used_mib: used >> 20,
        disk_used: disk.f_blocks.saturating_sub(disk.f_bfree) * disk.f_frsize,
        disk_total: disk.f_blocks * disk.f_frsize,
    })
}

/// The sums of the first line of /proc/stat: user, nice, system, idle, iowait, irq, …
fn times(stat: &str) -> Times {
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line
        .split_ascii_whitespace()
        .skip(1)
        // Guest time, behind these, is part of user time already.
        .take(8)
        .map(|field| field.parse().unwrap_or(0))
        .collect();
    let all: u64 = ticks.iter().sum();
    let idle: u64 = ticks.iter().skip(3).take(2).sum();
    Times {
        busy: all - idle,
        all,
    }
}

fn used_percent(before: Times, now: Times) -> f64 {
    let all = now.all.saturating_sub(before.all);
    if all == 0 {
        return 0.0;
    }
    let busy = now.busy.saturating_sub(before.busy);
    (busy as f64 * 10_000.0 / all as f64).round() / 100.0
}

fn field(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_measured_between_two_questions() {
        let before = times("cpu  100 0 100 700 100 0 0 0 50 0\ncpu0 1 1 1 1\n");
        assert_eq!(
            before,
            Times {
                busy: 200,
                all: 1000
            }
        );
        let now = times("cpu  175 0 100 800 125 0 0 0 50 0\n");
        assert!((used_percent(before, now) - 37.5).abs() < 1e-9);
        assert!(used_percent(now, now).abs() < 1e-9);
        assert!(
            used_percent(now, before).abs() < 1e-9,
            "a clock that went back"
        );
        assert_eq!(times(""), Times::default());
    }

    #[test]
    fn fields_of_memory_are_found_by_their_whole_name() {
        let text = "MemTotal:  100 kB\nSwapCached: 5 kB\nCached:   20 kB\n";
        assert_eq!(
            (field(text, "MemTotal"), field(text, "Cached")),
            (Some(100), Some(20))
        );
        assert_eq!(field(text, "MemFree"), None);
    }
}
