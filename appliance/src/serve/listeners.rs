//! The sockets that shards listen on.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, Socket, Type};
use tokio_rustls::rustls::ServerConfig;

use crate::config::{ClientCertificates, Config};
use crate::tls::{self, Clients, Identity};

/// What encrypted listeners have in common.
pub(super) struct Encrypted {
    pub(super) identity: Arc<Identity>,
    api: Arc<ServerConfig>,
    traffic: Arc<ServerConfig>,
}

impl Encrypted {
    pub(super) fn open(config: &Config) -> Result<Self, tls::TlsError> {
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
pub(super) type Listening = (TcpListener, Option<Arc<ServerConfig>>);

/// The sockets one shard listens on.
pub(super) struct Sockets {
    /// The API's, and whether a token is asked for there.
    pub(super) tcp: Vec<(Listening, bool)>,
    /// Those for what runs in sandboxes.
    pub(super) traffic: Vec<Listening>,
    /// Who needs no token on the Unix socket.
    pub(super) users: Arc<[u32]>,
    pub(super) unix: Option<UnixListener>,
}

/// One TCP listener per address and shard; the Unix socket is the first shard's.
pub(super) fn bind_all(config: &Config, encrypted: Option<&Encrypted>) -> Result<Vec<Sockets>> {
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
fn bind_each(addresses: &[SocketAddr], first: bool, key: &str) -> Result<Vec<TcpListener>> {
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

fn bind_tcp(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
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

fn bind_unix(path: &Path) -> Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        bail!(
            "Another daemon answers on {}; stop it, or set run_dir or api.socket",
            path.display()
        );
    }
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path)
        .with_context(|| format!("Socket {} can't be made; set api.socket", path.display()))?;
    // Anybody may connect; who may do something is decided by who the kernel says it is.
    fs::set_permissions(path, PermissionsExt::from_mode(0o666))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
