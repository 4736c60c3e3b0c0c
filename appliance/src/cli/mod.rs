//! The command line's way to a daemon: each command is a request or two, and a table of what came
//! back. With `--json` the API's own answer is printed, as it is.

mod events;
mod exec;
mod shell;
mod table;
mod top;

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context, Result};
use http_api::wire::{DiskLimits, Drained, HostInfo, Sandbox, Snapshot};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{At, CreateArgs, ForkArgs, HostArgs, LsArgs, NewSnapshotArgs, One, ResumeArgs};
use crate::client::{Client, Credentials, Way};
use table::Table;

pub use events::events;
pub use exec::exec;
pub use shell::shell;
pub use top::top;

/// Runs a command's requests on a runtime of its own.
///
/// # Errors
/// What the command says.
pub fn run<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build()?;
    let done = runtime.block_on(work);
    // A read of the terminal can't be called off, and nobody waits for it.
    runtime.shutdown_background();
    done
}

/// `value` of a query.
fn quoted(name: &str, value: &str) -> String {
    form_urlencoded::Serializer::new(String::new())
        .append_pair(name, value)
        .finish()
}

fn print_json(value: &impl Serialize) -> Result<ExitCode> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(ExitCode::SUCCESS)
}

/// `thaw ls`
///
/// # Errors
/// As the daemon's.
pub async fn ls(args: &LsArgs) -> Result<ExitCode> {
    let client = client(&args.at)?;
    let mut query = Vec::new();
    if let Some(states) = &args.state {
        query.push(quoted("state", states));
    }
    for label in &args.label {
        query.push(quoted("label", label));
    }
    let path = format!("/v1/sandboxes?{}", query.join("&"));
    let all: Vec<Sandbox> = client.get(&path).await?;
    if args.at.json {
        return print_json(&all);
    }
    let now = crate::clock::now_ms();
    let mut table = Table::new(&[
        "ID", "STATE", "TEMPLATE", "CPUS", "MIB", "AGE", "LEFT", "NOTE",
    ]);
    for sandbox in all {
        let left = sandbox.expires_at_ms.map(|at| at.saturating_sub(now));
        let left = left.or(sandbox.time_left_ms);
        table.row(&[
            sandbox.id.to_string(),
            sandbox.state.to_string(),
            sandbox.template.to_string(),
            sandbox.vcpus.to_string(),
            sandbox.memory_mb.to_string(),
            table::duration(now.saturating_sub(sandbox.created_at_ms)),
            left.map_or_else(|| "-".to_owned(), table::duration),
            sandbox.reason.unwrap_or_default(),
        ]);
    }
    print!("{table}");
    Ok(ExitCode::SUCCESS)
}

/// The daemon that was meant.
fn client(at: &At) -> Result<Client> {
    let Some(url) = &at.url else {
        return Ok(Client::new(&at.socket));
    };
    let credentials = Credentials {
        ca: at.ca.clone(),
        certificate: at.cert.clone().zip(at.key.clone()),
        token: at.token.clone(),
    };
    Ok(Client::over(Way::url(url, &credentials)?))
}

/// Prints a sandbox: its id, for scripts, or all of it.
fn show(at: &At, sandbox: &Sandbox) -> Result<ExitCode> {
    if at.json {
        return print_json(sandbox);
    }
    println!("{}", sandbox.id);
    Ok(ExitCode::SUCCESS)
}

/// `thaw create`
///
/// # Errors
/// As the daemon's.
pub async fn create(args: &CreateArgs) -> Result<ExitCode> {
    let mut request = json!({
        "template": args.template, "on_timeout": args.on_timeout.name(),
        "auto_resume": args.auto_resume, "env": pairs(&args.env), "labels": pairs(&args.label),
        "network": { "allow_internet_access": !args.no_internet },
    });
    let optional = [
        ("id", json!(args.id)),
        ("vcpus", json!(args.vcpus)),
        ("memory_mb", json!(args.memory_mb)),
        ("huge_pages", json!(args.huge_pages.then_some(true))),
        ("timeout_s", json!(args.timeout_s)),
    ];
    for (name, value) in optional {
        if !value.is_null() {
            request[name] = value;
        }
    }
    request["disk_limits"] = json!(DiskLimits {
        mib_per_s: args.disk_mib_per_s,
        ops_per_s: args.disk_ops_per_s,
    });
    show(
        &args.at,
        &client(&args.at)?.post("/v1/sandboxes", &request).await?,
    )
}

/// The last one of a key counts.
fn pairs(list: &[(String, String)]) -> BTreeMap<&str, &str> {
    let pairs = list.iter();
    pairs.map(|(key, value)| (&**key, &**value)).collect()
}

/// `thaw pause`
///
/// # Errors
/// As the daemon's.
pub async fn pause(args: &One) -> Result<ExitCode> {
    let path = format!("/v1/sandboxes/{}/pause", args.id);
    show(&args.at, &client(&args.at)?.post(&path, &json!({})).await?)
}

/// `thaw resume`
///
/// # Errors
/// As the daemon's.
pub async fn resume(args: &ResumeArgs) -> Result<ExitCode> {
    let path = format!("/v1/sandboxes/{}/resume", args.id);
    let request = match args.timeout_s {
        Some(seconds) => json!({ "timeout_s": seconds }),
        None => json!({}),
    };
    show(&args.at, &client(&args.at)?.post(&path, &request).await?)
}

/// `thaw fork`
///
/// # Errors
/// As the daemon's.
pub async fn fork(args: &ForkArgs) -> Result<ExitCode> {
    let path = format!("/v1/sandboxes/{}/fork", args.id);
    let request = json!({ "count": args.count, "timeout_s": args.timeout_s });
    let forks: Value = client(&args.at)?.post(&path, &request).await?;
    if args.at.json {
        print_json(&forks)?;
    } else {
        for fork in forks["sandboxes"].as_array().into_iter().flatten() {
            println!("{}", fork["id"].as_str().unwrap_or_default());
        }
    }
    let errors = forks["errors"].as_array().map_or(&[][..], Vec::as_slice);
    for error in errors {
        eprintln!("thaw: {}", error["detail"].as_str().unwrap_or_default());
    }
    Ok(ExitCode::from(u8::from(!errors.is_empty())))
}

/// `thaw rm`
///
/// # Errors
/// As the daemon's; those that come after the first failure stay.
pub async fn rm(at: &At, ids: &[String]) -> Result<ExitCode> {
    for id in ids {
        let path = format!("/v1/sandboxes/{id}");
        let removed = client(at)?.delete(&path).await;
        removed.with_context(|| format!("Sandbox {id} is not removed"))?;
    }
    if at.json {
        return print_json(&json!({ "removed": ids }));
    }
    Ok(ExitCode::SUCCESS)
}

/// `thaw snapshot create`
///
/// # Errors
/// As the daemon's.
pub async fn snapshot(args: &NewSnapshotArgs) -> Result<ExitCode> {
    let mut request = json!({ "sandbox": args.sandbox });
    if let Some(name) = &args.name {
        request["name"] = json!(name);
    }
    let made: Snapshot = client(&args.at)?.post("/v1/snapshots", &request).await?;
    if args.at.json {
        return print_json(&made);
    }
    println!("{}", made.name);
    Ok(ExitCode::SUCCESS)
}

/// `thaw snapshot ls`
///
/// # Errors
/// As the daemon's.
pub async fn snapshots(at: &At) -> Result<ExitCode> {
    let all: Vec<Snapshot> = client(at)?.get("/v1/snapshots").await?;
    if at.json {
        return print_json(&all);
    }
    let mut table = Table::new(&["NAME", "KIND", "CPUS", "MIB", "GENERATION", "PAGES", "OF"]);
    let or_none = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
    for snapshot in all {
        table.row(&[
            snapshot.name.to_string(),
            format!("{:?}", snapshot.kind).to_lowercase(),
            snapshot.vcpus.to_string(),
            snapshot.memory_mb.to_string(),
            or_none(snapshot.generation.map(u64::from)),
            or_none(snapshot.diff_pages),
            snapshot
                .sandbox
                .map_or_else(|| "-".to_owned(), |id| id.to_string()),
        ]);
    }
    print!("{table}");
    Ok(ExitCode::SUCCESS)
}

/// `thaw snapshot rm`
///
/// # Errors
/// As the daemon's.
pub async fn remove_snapshot(at: &At, name: &str) -> Result<ExitCode> {
    client(at)?.delete(&format!("/v1/snapshots/{name}")).await?;
    if at.json {
        return print_json(&json!({ "removed": [name] }));
    }
    Ok(ExitCode::SUCCESS)
}

/// `thaw host`
///
/// # Errors
/// As the daemon's.
pub async fn host(args: &HostArgs) -> Result<ExitCode> {
    let host: HostInfo = client(&args.at)?.get("/v1/host").await?;
    if args.at.json {
        return print_json(&host);
    }
    let states: Vec<_> = host
        .states
        .iter()
        .map(|(state, n)| format!("{n} {state}"))
        .collect();
    let room = &host.capacity;
    println!("status     {}", format!("{:?}", host.status).to_lowercase());
    println!("version    {} on Linux {}", host.version, host.kernel);
    println!(
        "vmm        {} {} ({}): {}",
        host.vmm.name, host.vmm.version, host.vmm.accelerator, host.vmm.reason
    );
    println!(
        "cpu        {} threads, {}",
        host.cpu.threads, host.cpu.model
    );
    println!(
        "memory     {} MiB, {} available, {} given to running sandboxes",
        room.memory_total_mb, room.memory_available_mb, room.memory_allocated_mb
    );
    println!(
        "disk       {} MiB, {} free; {}",
        room.disk_total_mb, room.disk_available_mb, host.disks
    );
    println!("slots      {} of {}", room.slots_used, room.slots_total);
    println!("sandboxes  {} ({})", host.sandboxes, states.join(", "));
    println!("templates  {}", host.templates);
    Ok(ExitCode::SUCCESS)
}

/// `thaw drain`
///
/// # Errors
/// As the daemon's.
pub async fn drain(at: &At, undo: bool) -> Result<ExitCode> {
    if undo {
        client(at)?.delete("/v1/host/drain").await?;
        return if at.json {
            print_json(&json!({ "status": "ready" }))
        } else {
            Ok(ExitCode::SUCCESS)
        };
    }
    if !at.json {
        eprintln!("Pausing all that runs …");
    }
    let drained: Drained = client(at)?.post("/v1/host/drain", &json!({})).await?;
    let code = ExitCode::from(u8::from(!drained.left.is_empty()));
    if at.json {
        print_json(&drained)?;
        return Ok(code);
    }
    println!("{} paused", drained.paused.len());
    for left in drained.left {
        let reason = left.reason.unwrap_or_default();
        eprintln!(
            "thaw: {} is {} and was not paused. {reason}",
            left.id, left.state
        );
    }
    Ok(code)
}
