//! `thaw top`: what the memory of running sandboxes does, live.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use http_api::wire::{MemoryStats, Sandbox};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::table::Table;
use super::{client, print_json};
use crate::args::TopArgs;
use crate::client::{Client, ClientError};

/// Moves to the first line and clears the screen. Source: ECMA-48.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// One look at all that runs.
struct Look {
    at: Instant,
    rows: Vec<(Sandbox, MemoryStats)>,
}

impl Look {
    async fn take(client: &Client) -> Result<Self> {
        let at = Instant::now();
        let running: Vec<Sandbox> = client.get("/v1/sandboxes?state=running").await?;
        let mut rows = Vec::new();
        for sandbox in running {
            let path = format!("/v1/sandboxes/{}/memory", sandbox.id);
            match client.get(&path).await {
                Ok(memory) => rows.push((sandbox, memory)),
                // It has gone meanwhile.
                Err(ClientError::Refused(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self { at, rows })
    }

    /// Faults a second since an earlier look, by run.
    fn rates(&self, before: &Self) -> BTreeMap<String, f64> {
        let seconds = (self.at - before.at).as_secs_f64().max(0.001);
        let earlier: BTreeMap<_, _> = before
            .rows
            .iter()
            .map(|(s, m)| (run(s), m.faults))
            .collect();
        let rate = |(sandbox, memory): &(Sandbox, MemoryStats)| {
            let faults = earlier.get(&run(sandbox)).copied().unwrap_or(0);
            (
                run(sandbox),
                memory.faults.saturating_sub(faults) as f64 / seconds,
            )
        };
        self.rows.iter().map(rate).collect()
    }
}

/// Counts begin anew with each run.
fn run(sandbox: &Sandbox) -> String {
    sandbox.execution_id.clone().unwrap_or_default()
}

/// Shows it again and again; once where nobody looks on.
///
/// # Errors
/// As the daemon's.
pub async fn top(args: &TopArgs) -> Result<ExitCode> {
    let client = client(&args.at)?;
    let interval = Duration::from_millis(args.interval_ms.max(100));
    let live = !args.at.json && !args.once && std::io::stdout().is_terminal();
    let mut before = Look::take(&client).await?;
    loop {
        sleep(interval).await;
        let now = Look::take(&client).await?;
        let rates = now.rates(&before);
        if args.at.json {
            return print_json(&as_json(&now, &rates));
        }
        let text = as_table(&now, &rates).to_string();
        if !live {
            print!("{text}");
            return Ok(ExitCode::SUCCESS);
        }
        let rows = crate::sys::terminal::size(std::io::stdout().as_fd()).map(|(_, rows)| rows);
        print!("{CLEAR}{}", fit(&text, rows.unwrap_or(24).into()));
        std::io::stdout().flush()?;
        before = now;
    }
}

/// As much of a table as a screen shows, and how much it doesn't: its head would be pushed out.
fn fit(text: &str, rows: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    // The last row is the cursor's.
    let room = rows.saturating_sub(1).max(2);
    if lines.len() <= room {
        return text.to_owned();
    }
    let (shown, rest) = lines.split_at(room - 1);
    format!("{}\n… and {} more\n", shown.join("\n"), rest.len())
}

fn as_json(look: &Look, rates: &BTreeMap<String, f64>) -> Vec<Value> {
    let row = |(sandbox, memory): &(Sandbox, MemoryStats)| {
        json!({
            "id": sandbox.id, "faults_per_s": rates[&run(sandbox)],
            "fault_us_p50": memory.fault_us_p50, "fault_us_p99": memory.fault_us_p99,
            "resident_pages": memory.resident_pages, "guest_pages": memory.guest_pages,
        })
    };
    look.rows.iter().map(row).collect()
}

fn as_table(look: &Look, rates: &BTreeMap<String, f64>) -> Table {
    let heading = [
        "ID", "FAULTS/S", "P50 US", "P99 US", "RESIDENT", "TOTAL", "%",
    ];
    let mut table = Table::new(&heading);
    for (sandbox, memory) in &look.rows {
        let share = 100.0 * memory.resident_pages as f64 / memory.guest_pages.max(1) as f64;
        table.row(&[
            sandbox.id.to_string(),
            format!("{:.0}", rates[&run(sandbox)]),
            format!("{:.1}", memory.fault_us_p50),
            format!("{:.1}", memory.fault_us_p99),
            memory.resident_pages.to_string(),
            memory.guest_pages.to_string(),
            format!("{share:.1}"),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_cut_to_the_screen_below_its_head() {
        let table = "HEAD\n1\n2\n3\n";
        assert_eq!(fit(table, 5), table);
        assert_eq!(fit(table, 4), "HEAD\n1\n… and 2 more\n");
        assert_eq!(fit(table, 0), "HEAD\n… and 3 more\n");
    }
}
