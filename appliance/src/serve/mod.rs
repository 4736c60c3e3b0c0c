//! `thaw serve`: puts the daemon together, runs it, and takes it apart.

mod assembly;
mod http;
mod listeners;

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::claim::Claim;
use crate::config::Config;
use crate::gateway::Gateway;
use crate::shard::{Asked, Shard};
use assembly::{Owned, assemble};
use http::{Costs, serve_http};
use listeners::{Encrypted, bind_all};

/// Requests that one shard may have waiting.
const MAILBOX: usize = 1024;

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// What is missing or taken, and what to do about it.
pub fn run(config: &Config) -> Result<()> {
    let main = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    for dir in [&config.data_dir, &config.run_dir] {
        check_writable(dir)?;
    }
    let _claim = Claim::take(config)?;
    let encrypted = config.speaks_tls().then(|| Encrypted::open(config));
    let encrypted = encrypted
        .transpose()
        .context("TLS can't be spoken; see [tls] and api.client_ca")?;
    let (host, cells) = main.block_on(assemble(config))?;
    // An engine outlives its daemon's sudden end. This is none, unless a guest has outlived one that
    // was: it waits for a start that succeeds.
    let outlived = cells.iter().any(|(_, left)| left.is_some());
    let listeners = bind_all(config, encrypted.as_ref()).inspect_err(|_| {
        host.ready.end();
        if !outlived {
            host.engines.stop();
        }
    })?;

    let shard_count = config.shard_count();
    let mut per_shard: Vec<Vec<Owned>> = (0..shard_count).map(|_| Vec::new()).collect();
    for (cell, left) in cells {
        per_shard[Gateway::owner_of(&cell.row().id, shard_count)].push((cell, left));
    }
    let (senders, mailboxes): (Vec<_>, Vec<_>) = (0..shard_count)
        .map(|_| mpsc::channel::<Asked>(MAILBOX))
        .unzip();
    let gateway = Gateway::new(host.clone(), senders);
    let (stop, stopping) = watch::channel(false);

    let mut threads = Vec::new();
    let parts = per_shard.into_iter().zip(mailboxes).zip(listeners);
    for (number, ((cells, mailbox), sockets)) in parts.enumerate() {
        let (host, gateway, stopping) = (host.clone(), gateway.clone(), stopping.clone());
        let costs = Costs::of(config);
        let thread = std::thread::Builder::new().name(format!("shard-{number}"));
        threads.push(thread.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async move {
                let shard = Shard::new(host, cells);
                let serving = serve_http(sockets, gateway, costs, stopping);
                let (served, ()) = tokio::join!(serving, shard.run(mailbox));
                served
            })
        })?);
    }
    let vmm = host.drivers.chosen().info();
    tracing::info!(
        vmm = vmm.name,
        version = vmm.version,
        accelerator = vmm.accelerator,
        reason = vmm.reason,
        disks = host.disks.reason(),
        shards = shard_count,
        engines = host.engines.count(),
        workers = host.waiting,
        listen = ?config.api.listen,
        listen_tls = ?config.api.listen_tls,
        traffic = ?config.traffic.listen,
        traffic_tls = ?config.traffic.listen_tls,
        socket = %config.api_socket().display(),
        "Ready"
    );

    main.block_on(async {
        tokio::select! {
            signal = wait_for_signal() => signal?,
            () = keep_fresh(encrypted.as_ref()) => {}
        }
        tracing::info!("Stopping: pausing what runs");
        host.ready.close();
        gateway.pause_all().await;
        host.events.close();
        anyhow::Ok(())
    })?;
    // Listeners end, gateways with them, then mailboxes, then shards.
    stop.send_replace(true);
    drop(gateway);
    for thread in threads {
        match thread.join() {
            Ok(result) => result.context("A shard failed")?,
            Err(_) => bail!("A shard panicked"),
        }
    }
    host.ready.end();
    host.confinement.close();
    host.engines.stop();
    if let Err(error) = main.block_on(host.slots.end()) {
        tracing::warn!(%error, "The host's rules for network slots are still there");
    }
    let _ = fs::remove_file(config.api_socket());
    tracing::info!("Stopped");
    Ok(())
}

async fn wait_for_signal() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// How often certificates are looked at again.
const FRESH: Duration = Duration::from_secs(60);

/// Has certificates renewed, or read again, for ever.
async fn keep_fresh(encrypted: Option<&Encrypted>) {
    loop {
        tokio::time::sleep(FRESH).await;
        if let Some(Err(error)) = encrypted.map(|all| all.identity.refresh()) {
            let error = anyhow::Error::from(error);
            tracing::error!("The certificate that is shown is kept: {error:#}");
        }
    }
}

fn check_writable(dir: &Path) -> Result<()> {
    let what_to_do = || {
        format!(
            "Directory {} can't be written; make it, or set data_dir and run_dir to ones that can",
            dir.display()
        )
    };
    fs::create_dir_all(dir).with_context(what_to_do)?;
    let probe = dir.join(".probe");
    fs::write(&probe, b"").with_context(what_to_do)?;
    fs::remove_file(&probe).with_context(what_to_do)
}
