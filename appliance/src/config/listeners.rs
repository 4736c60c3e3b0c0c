//! `[api]`, `[traffic]` and `[tls]`: who is listened to, where, and how much.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::Deserialize;

use super::{Config, Wrong};

/// `[api]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiConfig {
    /// TCP addresses. Those that are not loopback ask for a token in any case.
    pub listen: Vec<SocketAddr>,
    /// TCP addresses that speak TLS. As for the others, a token is asked for.
    pub listen_tls: Vec<SocketAddr>,
    /// Whether loopback addresses ask for one, too.
    pub require_token: bool,
    /// Authority of clients' certificates: one of those is as good as a token where TLS is spoken.
    pub client_ca: Option<PathBuf>,
    /// Whether those addresses refuse whoever has none; by default a token will do.
    pub client_certificates: ClientCertificates,
    /// Unix socket; `api.sock` in the run directory when absent.
    pub socket: Option<PathBuf>,
    /// The longest body of a control request, KiB.
    pub body_kib: usize,
    /// How long such a body may take to arrive, milliseconds.
    pub body_time_ms: u64,
    /// The longest head of a request, KiB. This and the following two hold for `[traffic]`, too.
    pub head_kib: usize,
    /// How long a request's head may take, from the end of the request before, milliseconds.
    pub head_time_ms: u64,
    /// Connections of one listener and shard at the same time.
    pub connections: usize,
    /// Streams of events, commands and terminals, and requests that wait, of one listener and shard
    /// at the same time.
    pub streams: usize,
    /// Users who may use it besides root and the daemon's own, by number. Others need a token.
    pub users: Vec<u32>,
}

/// What a certificate of a client is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientCertificates {
    /// As good as a token.
    #[default]
    Accept,
    /// The only way in.
    Demand,
}

/// `[tls]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Sandboxes are below it: `{port}-{id}.{domain}`.
    pub domain: Option<String>,
    /// What the host is called by clients, besides localhost, the domain and the addresses that it
    /// listens on.
    pub names: Vec<String>,
    /// A certificate with those that lead to its authority, PEM; instead of one of an authority of
    /// our own.
    pub certificate: Option<PathBuf>,
    /// Its key, PEM.
    pub key: Option<PathBuf>,
}

/// `[traffic]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrafficConfig {
    /// TCP addresses on which ports of sandboxes are reached.
    pub listen: Vec<SocketAddr>,
    /// Addresses that speak TLS, for `https://{port}-{id}.{domain}`.
    pub listen_tls: Vec<SocketAddr>,
    /// Whether they may be other than loopback: whoever reaches those reaches every port that
    /// programs in sandboxes open, and reads along if the network lets him. The guests' own daemons
    /// ask for their token all the same.
    pub public: bool,
    /// Requests that one shard passes on at the same time, upgraded connections included.
    pub requests: usize,
}

impl Default for TrafficConfig {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 3002))],
            listen_tls: Vec::new(),
            public: false,
            requests: 4096,
        }
    }
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 3000))],
            listen_tls: Vec::new(),
            require_token: false,
            client_ca: None,
            client_certificates: ClientCertificates::Accept,
            body_kib: 1024,
            body_time_ms: 30_000,
            head_kib: 64,
            head_time_ms: 60_000,
            connections: 8192,
            streams: 1024,
            socket: None,
            users: Vec::new(),
        }
    }
}

impl Config {
    pub(super) fn check_listeners(&self) -> Result<(), Wrong> {
        let (api, traffic) = (&self.api, &self.traffic);
        for (key, list) in [
            ("traffic.listen", &traffic.listen),
            ("traffic.listen_tls", &traffic.listen_tls),
        ] {
            let open = list.iter().find(|address| !address.ip().is_loopback());
            if let (Some(address), false) = (open, traffic.public) {
                let problem = format!(
                    "has {address}, which is not loopback; set traffic.public if whoever reaches it \
                     may reach the ports that programs in sandboxes open"
                );
                return Err((key.into(), problem));
            }
        }
        let mut seen: Vec<(&SocketAddr, &str)> = Vec::new();
        for (key, list) in [
            ("api.listen", &api.listen),
            ("api.listen_tls", &api.listen_tls),
            ("traffic.listen", &traffic.listen),
            ("traffic.listen_tls", &traffic.listen_tls),
        ] {
            for address in list {
                if let Some((_, other)) = seen.iter().find(|(there, _)| *there == address) {
                    let problem = format!("has {address}, which {other} has, too");
                    return Err((key.into(), problem));
                }
                seen.push((address, key));
            }
        }
        Ok(())
    }

    pub(super) fn check_limits(&self) -> Result<(), Wrong> {
        let api = &self.api;
        for (key, value, most) in [
            ("api.body_kib", api.body_kib as u64, 1 << 20),
            ("api.body_time_ms", api.body_time_ms, 3_600_000),
            ("api.head_kib", api.head_kib as u64, 1024),
            ("api.head_time_ms", api.head_time_ms, 3_600_000),
            ("api.connections", api.connections as u64, 1 << 20),
            ("api.streams", api.streams as u64, 1 << 20),
            ("traffic.requests", self.traffic.requests as u64, 1 << 20),
        ] {
            if !(1..=most).contains(&value) {
                return Err((key.into(), format!("is {value}; 1 to {most} are possible")));
            }
        }
        Ok(())
    }

    pub(super) fn check_tls(&self) -> Result<(), Wrong> {
        let (api, tls) = (&self.api, &self.tls);
        let wrong = |key: &str, problem: String| Err((key.to_owned(), problem));
        for (key, name) in tls
            .names
            .iter()
            .map(|name| ("tls.names", name))
            .chain(tls.domain.iter().map(|name| ("tls.domain", name)))
        {
            let is_address = key == "tls.names" && name.parse::<IpAddr>().is_ok();
            if !is_host_name(name) && !is_address {
                return wrong(key, format!("has {name:?}, which is no name of a host"));
            }
        }
        match (&tls.certificate, &tls.key) {
            (Some(_), None) => return wrong("tls.key", "is missing beside tls.certificate".into()),
            (None, Some(_)) => return wrong("tls.certificate", "is missing beside tls.key".into()),
            (Some(_), Some(_)) if !tls.names.is_empty() => {
                let problem = "are those of tls.certificate, which can't be given others";
                return wrong("tls.names", problem.into());
            }
            _ => {}
        }
        if api.client_ca.is_some() && api.listen_tls.is_empty() {
            return wrong(
                "api.client_ca",
                "is of no use without api.listen_tls".into(),
            );
        }
        if api.client_certificates == ClientCertificates::Demand && api.client_ca.is_none() {
            let problem = "can't be demanded without api.client_ca";
            return wrong("api.client_certificates", problem.into());
        }
        Ok(())
    }

    /// Whether any listener speaks TLS.
    #[must_use]
    pub fn speaks_tls(&self) -> bool {
        !self.api.listen_tls.is_empty() || !self.traffic.listen_tls.is_empty()
    }

    /// What a certificate of ours has to be good for.
    #[must_use]
    pub fn tls_names(&self) -> BTreeSet<String> {
        let listening = self.api.listen_tls.iter().chain(&self.traffic.listen_tls);
        let addresses = listening.map(SocketAddr::ip);
        let addresses = addresses.filter(|ip| !ip.is_unspecified());
        let mut names: BTreeSet<String> = addresses.map(|ip| ip.to_string()).collect();
        names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
        names.extend(self.tls.names.iter().map(|name| name.to_ascii_lowercase()));
        if let Some(domain) = &self.tls.domain {
            let domain = domain.to_ascii_lowercase();
            names.insert(format!("*.{domain}"));
            names.insert(domain);
        }
        names
    }

    /// Where clients find ports of sandboxes below a domain: it, with the port that is listened on
    /// if clients would not take it by themselves.
    #[must_use]
    pub fn sandbox_domain(&self) -> Option<String> {
        let domain = self.tls.domain.as_ref()?;
        match self.traffic.listen_tls.first()?.port() {
            443 => Some(domain.clone()),
            port => Some(format!("{domain}:{port}")),
        }
    }
}

/// Letters, digits and hyphens, in parts. Source: RFC 1123.
fn is_host_name(name: &str) -> bool {
    let part = |part: &str| {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        (1..=63).contains(&part.len())
            && part.bytes().all(legal)
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    name.len() <= 200 && name.split('.').all(part)
}
