//! `thaw serve`: puts the daemon together, runs it, and takes it apart.

use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_api::auth::Access;
use http_api::options::{Limits, Options};
use http_api::server::{ConnectionLimits, TlsListener, serve};
use parking_lot::{Mutex, RwLock};
use snapshot_format::BuildStore;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_rustls::rustls::ServerConfig;

use crate::catalogue::{Catalogue, builds, templates, tokens};
use crate::claim::Claim;
use crate::config::{ClientCertificates, Config};
use crate::disks::Disks;
use crate::engines::{Engines, topology};
use crate::events::Events;
use crate::gateway::Gateway;
use crate::host::Host;
use crate::huge_pages::HugePages;
use crate::metrics::Metrics;
use crate::network::{Slots, range};
use crate::recovery;
use crate::sandbox::Cell;
use crate::sandbox::adoption::Left;
use crate::shard::{Asked, Shard};
use crate::template::{Template, Templates};
use crate::tls::{self, Clients, Identity};
use crate::tokens::Tokens;
use crate::vmm::confinement::Confinement;
use crate::vmm::ready::ReadyVmms;
use crate::vmm::{choice, launch};

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

/// A sandbox, and the guest that is to be taken over with it.
type Owned = (Cell, Option<Left>);

/// Everything but shards and listeners.
async fn assemble(config: &Config) -> Result<(Arc<Host>, Vec<Owned>)> {
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
    for (row, mut left) in rows {
        if let Some(left) = &mut left {
            let session = left.record.session.as_deref();
            let inherited = session.and_then(|session| engines.claim_inherited(session));
            left.inherited = inherited.map(ManuallyDrop::new);
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

/// What encrypted listeners have in common.
struct Encrypted {
    identity: Arc<Identity>,
    api: Arc<ServerConfig>,
    traffic: Arc<ServerConfig>,
}

impl Encrypted {
    fn open(config: &Config) -> Result<Self, tls::TlsError> {
        let identity = Identity::open(config)?;
        let clients = match (&config.api.client_ca, config.api.client_certificates) {
            (None, _) => Clients::Anybody,
            (Some(ca), ClientCertificates::Accept) => Clients::Certified(ca.clone()),
            (Some(ca), ClientCertificates::Demand) => Clients::OnlyCertified(ca.clone()),
        };
        Ok(Self {
            api: tls::server(identity.clone(), &clients)?,
            traffic: tls::server(identity.clone(), &Clients::Anybody)?,
            identity,
        })
    }
}

/// A TCP listener, and what it says in handshakes if it speaks TLS.
type Listening = (std::net::TcpListener, Option<Arc<ServerConfig>>);

/// The sockets one shard listens on.
struct Sockets {
    /// The API's, and whether a token is asked for there.
    tcp: Vec<(Listening, bool)>,
    /// Those for what runs in sandboxes.
    traffic: Vec<Listening>,
    /// Who needs no token on the Unix socket.
    users: Arc<[u32]>,
    unix: Option<std::os::unix::net::UnixListener>,
}

/// One TCP listener per address and shard; the Unix socket is the first shard's.
fn bind_all(config: &Config, encrypted: Option<&Encrypted>) -> Result<Vec<Sockets>> {
    let path = config.api_socket();
    let mut unix = Some(bind_unix(&path)?);
    let own = nix::unistd::geteuid().as_raw();
    let users: Arc<[u32]> = config.api.users.iter().copied().chain([0, own]).collect();
    let (api, traffic) = (&config.api, &config.traffic);
    let asks = |address: &SocketAddr| api.require_token || !address.ip().is_loopback();
    let mut all = Vec::new();
    for shard in 0..config.shard_count() {
        let bind = |addresses: &[SocketAddr], tls: Option<&Arc<ServerConfig>>, key: &str| {
            let bound = bind_each(addresses, shard == 0, key)?.into_iter();
            anyhow::Ok(
                bound
                    .map(|listener| (listener, tls.cloned()))
                    .collect::<Vec<_>>(),
            )
        };
        let mut tcp = bind(&api.listen, None, "api.listen")?;
        tcp.extend(bind(
            &api.listen_tls,
            encrypted.map(|e| &e.api),
            "api.listen_tls",
        )?);
        let asking = api.listen.iter().chain(&api.listen_tls).map(asks);
        let mut passing = bind(&traffic.listen, None, "traffic.listen")?;
        passing.extend(bind(
            &traffic.listen_tls,
            encrypted.map(|e| &e.traffic),
            "traffic.listen_tls",
        )?);
        all.push(Sockets {
            tcp: tcp.into_iter().zip(asking).collect(),
            traffic: passing,
            users: users.clone(),
            unix: unix.take(),
        });
    }
    Ok(all)
}

/// A shard's listeners on all addresses of a key.
fn bind_each(
    addresses: &[SocketAddr],
    first: bool,
    key: &str,
) -> Result<Vec<std::net::TcpListener>> {
    let mut listeners = Vec::new();
    for address in addresses {
        // The first one shares its port with nobody outside this process.
        if first {
            bind_tcp(*address, false).map(drop).with_context(|| {
                format!(
                    "{address} can't be listened on; is another daemon running there? Set {key}"
                )
            })?;
        }
        let listener = bind_tcp(*address, true);
        listeners.push(listener.with_context(|| format!("Listening on {address}"))?);
    }
    Ok(listeners)
}

fn bind_tcp(address: SocketAddr, shared: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    if shared {
        socket.listen(1024)?;
    }
    Ok(socket.into())
}

fn bind_unix(path: &Path) -> Result<std::os::unix::net::UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        bail!(
            "Another daemon answers on {}; stop it, or set run_dir or api.socket",
            path.display()
        );
    }
    let _ = fs::remove_file(path);
    let listener = std::os::unix::net::UnixListener::bind(path)
        .with_context(|| format!("Socket {} can't be made; set api.socket", path.display()))?;
    // Anybody may connect; who may do something is decided by who the kernel says it is.
    fs::set_permissions(path, PermissionsExt::from_mode(0o666))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// What requests may cost, and where sandboxes are.
struct Costs {
    connections: ConnectionLimits,
    requests: Limits,
    /// Requests for what runs in sandboxes.
    passing: usize,
    domain: Option<Arc<str>>,
}

impl Costs {
    fn of(config: &Config) -> Self {
        let api = &config.api;
        Self {
            connections: ConnectionLimits {
                head_time: Duration::from_millis(api.head_time_ms),
                head_bytes: api.head_kib << 10,
                connections: api.connections,
                ..ConnectionLimits::default()
            },
            requests: Limits {
                body_bytes: api.body_kib << 10,
                body_time: Duration::from_millis(api.body_time_ms),
                streams: api.streams,
            },
            passing: config.traffic.requests,
            domain: config.sandbox_domain().map(Into::into),
        }
    }
}

/// Serves the API on a shard's sockets until told to stop.
async fn serve_http(
    sockets: Sockets,
    gateway: Gateway,
    costs: Costs,
    stopping: watch::Receiver<bool>,
) -> io::Result<()> {
    let limits = costs.connections;
    let router = |require_token| {
        let users = sockets.users.clone();
        let access = Access {
            require_token,
            users,
        };
        let options = Options {
            access,
            limits: costs.requests,
            domain: costs.domain.clone(),
        };
        http_api::router(gateway.clone(), options)
    };
    let until_stopped = || {
        let mut stopping = stopping.clone();
        async move {
            let _ = stopping.wait_for(|stop| *stop).await;
        }
    };
    let mut servers = tokio::task::JoinSet::new();
    let mut listen = |(listener, tls): Listening, router: axum::Router| {
        let listener = TcpListener::from_std(listener)?;
        match tls {
            None => servers.spawn(serve(listener, router, limits, until_stopped())),
            Some(tls) => {
                let listener = TlsListener::new(listener, tls);
                servers.spawn(serve(listener, router, limits, until_stopped()))
            }
        };
        io::Result::Ok(())
    };
    for (listening, require_token) in sockets.tcp {
        listen(listening, router(require_token))?;
    }
    for listening in sockets.traffic {
        let router = http_api::traffic::traffic(gateway.clone(), costs.passing);
        listen(listening, router)?;
    }
    if let Some(listener) = sockets.unix {
        let listener = UnixListener::from_std(listener)?;
        servers.spawn(serve(listener, router(true), limits, until_stopped()));
    }
    until_stopped().await;
    drop(gateway);
    // Idle connections don't hold the daemon up for ever.
    let finished = async { while servers.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(Duration::from_secs(5), finished).await;
    servers.shutdown().await;
    Ok(())
}
