//! All that a daemon is made of but its shards and listeners.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use parking_lot::{Mutex, RwLock};
use snapshot_format::BuildStore;

use crate::catalogue::{Catalogue, builds, templates, tokens};
use crate::config::Config;
use crate::disks::Disks;
use crate::engines::{Engines, Tables, topology};
use crate::events::Events;
use crate::host::Host;
use crate::huge_pages::HugePages;
use crate::metrics::Metrics;
use crate::network::{Slots, range};
use crate::recovery;
use crate::sandbox::Cell;
use crate::sandbox::adoption::Left;
use crate::template::{Template, Templates};
use crate::tokens::Tokens;
use crate::vmm::confinement::Confinement;
use crate::vmm::ready::ReadyVmms;
use crate::vmm::{choice, launch};

/// How long engines that were killed may take to end.
const ENGINES_END: Duration = Duration::from_secs(5);

/// A sandbox, and the guest that is to be taken over with it.
pub(super) type Owned = (Cell, Option<Left>);

/// Puts it together, from what the configuration says and earlier daemons have left.
pub(super) async fn assemble(config: &Config) -> Result<(Arc<Host>, Vec<Owned>)> {
    check_userfaultfd()?;
    launch::prepare_host().context("Preparing /run for VMM disks; is it writable?")?;
    let catalogue = Catalogue::open(&config.catalogue())
        .with_context(|| format!("Opening the catalogue in {}", config.data_dir.display()))?;
    check_tokens(config, &catalogue).await?;
    catalogue
        .call(|connection| templates::remove_transient(connection))
        .await?;
    let events = Events::open(&config.catalogue()).context("Opening the catalogue for events")?;
    keep_private(&config.data_dir)?;
    let store = BuildStore::open_or_create(&config.data_dir.join("builds"))
        .context("Opening the store of builds")?;
    let drivers = choice::choose(config).await.context("No VMM can be used")?;
    let images: Vec<PathBuf> = config.templates.iter().map(|t| t.disk.clone()).collect();
    let disks = Disks::start(&config.disks, &config.instance, &config.data_dir, &images)
        .with_context(|| format!("Trying disks in {}", config.data_dir.display()))?;
    let network = &config.network;
    range::check(network.pool, &config.instance)
        .await
        .context("Choosing addresses for network slots")?;
    let slots = Slots::start(&config.instance, network.pool, network.egress())
        .context("Setting the host's rules for network slots; is nftables in this kernel?")?;
    let confinement = Confinement::open(&config.vmm, &config.instance);
    let on_host = (&slots, &confinement);
    let rows = recovery::recover(config, &catalogue, &store, on_host, &events).await?;
    slots.keep_ready(network.ready_slots, rows.iter().map(|(row, _)| row.slot));
    let (run_dir, mut engine) = (config.run_dir.clone(), config.engine.clone());
    let calibrating = tokio::task::spawn_blocking(move || {
        let waiting = topology::calibrate(&run_dir, &mut engine);
        (engine, waiting)
    });
    let (engine, waiting) = calibrating.await.context("Measuring faults")?;
    let engines = Engines::start(&config.run_dir, &topology::nodes(), &engine)
        .context("Starting the engines")?;

    let mut all: Templates = config
        .templates
        .iter()
        .map(Template::from)
        .map(|t| (t.name.clone(), t))
        .collect();
    for row in catalogue
        .call(|connection| templates::all(connection))
        .await?
    {
        all.entry(row.name.clone()).or_insert_with(|| row.into());
    }
    let mut cells = Vec::new();
    let engines_are_gone = Instant::now() + ENGINES_END;
    for (row, mut left) in rows {
        if let Some(left) = &mut left {
            let run_dir = config.run_dir.join("sandboxes").join(row.id.as_str());
            left.look_for_memory(&engines, &store, &run_dir, engines_are_gone);
        }
        let generation = match row.build {
            Some(id) => {
                let found = catalogue
                    .call(move |connection| builds::get(connection, id))
                    .await?;
                found.map(|build| build.generation.get())
            }
            None => None,
        };
        let cell = Cell::new(row, generation, config.network.pool, events.clone());
        cells.push((cell, left));
    }
    engines.drop_inherited();
    let metrics = Metrics::default();
    let ready = ReadyVmms::start(
        (drivers.chosen().clone(), confinement.groups().cloned()),
        slots.clone(),
        &config.run_dir,
        config.ready_processes(),
        metrics.vmms.clone(),
    )
    .context("Keeping VMMs ready")?;
    let host = Arc::new(Host {
        data_dir: config.data_dir.clone(),
        run_dir: config.run_dir.clone(),
        boot_timeout: Duration::from_secs(config.vmm.boot_timeout_s),
        drain_time: Duration::from_millis(network.drain_ms),
        catalogue,
        engines,
        tables: Tables::of(&config.run_dir),
        engine,
        waiting,
        drivers,
        ready,
        confinement,
        huge_pages: HugePages::default(),
        slots,
        disks,
        disk_limits: config.disks.limits(),
        store,
        templates: RwLock::new(all),
        events,
        metrics,
        tokens: Tokens::default(),
        draining: AtomicBool::new(false),
        unrecorded: Mutex::default(),
    });
    host.collect_garbage().await?;
    Ok((host, cells))
}

/// An address that others reach is of no use to anybody without a token, and looks as if it were.
async fn check_tokens(config: &Config, catalogue: &Catalogue) -> Result<()> {
    let open = |address: &&SocketAddr| !address.ip().is_loopback();
    let plain = config
        .api
        .listen
        .iter()
        .map(|address| ("api.listen", address));
    let encrypted = config.api.listen_tls.iter();
    // Who has a certificate needs no token.
    let encrypted = encrypted.filter(|_| config.api.client_ca.is_none());
    let encrypted = encrypted.map(|address| ("api.listen_tls", address));
    let Some((key, address)) = plain.chain(encrypted).find(|(_, a)| open(a)) else {
        return Ok(());
    };
    let all = catalogue.call(|connection| tokens::all(connection)).await?;
    if all.is_empty() {
        bail!(
            "{key} has {address}, which is not loopback and asks for a token, but there is \
             none; make one with `thaw token create` first"
        );
    }
    Ok(())
}

/// Memory and disks of guests are nobody's but ours; VMMs are shown theirs.
fn keep_private(data_dir: &Path) -> Result<()> {
    for dir in ["builds", "sandboxes", "bases"].map(|name| data_dir.join(name)) {
        let kept = fs::create_dir_all(&dir)
            .and_then(|()| fs::set_permissions(&dir, PermissionsExt::from_mode(0o700)));
        kept.with_context(|| format!("Keeping {} to ourselves", dir.display()))?;
    }
    Ok(())
}

fn check_userfaultfd() -> Result<()> {
    use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, FEATURE_MISSING_SHMEM, Uffd};
    Uffd::create(FEATURE_EVENT_REMOVE | FEATURE_MISSING_SHMEM)
        .map(|_| ())
        .context(
            "userfaultfd can't be used: run as root, or allow /dev/userfaultfd to this user; the \
         kernel needs CONFIG_USERFAULTFD (5.11 or later)",
        )
}
