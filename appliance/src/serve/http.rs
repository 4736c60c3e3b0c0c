//! HTTP on the sockets of one shard.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use http_api::auth::Access;
use http_api::options::{Limits, Options};
use http_api::server::{ConnectionLimits, TlsListener, serve};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use super::listeners::{Listening, Sockets};
use crate::config::Config;
use crate::gateway::Gateway;

/// What requests may cost, and where sandboxes are.
pub(super) struct Costs {
    connections: ConnectionLimits,
    requests: Limits,
    /// Requests for what runs in sandboxes.
    passing: usize,
    domain: Option<Arc<str>>,
}

impl Costs {
    pub(super) fn of(config: &Config) -> Self {
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
pub(super) async fn serve_http(
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
