//! The way to a daemon: its Unix socket on this machine, or a URL and what it takes to be let in.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::Uri;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

/// Why there is no way.
#[derive(Debug, Error)]
pub enum WayError {
    /// The URL is none of ours.
    #[error("--url is {url:?}; https://host:port is needed, or http://host:port on this machine")]
    Url {
        /// What was given.
        url: String,
    },
    /// A token would be read by whoever listens.
    #[error("--url is {url:?}, which is neither this machine nor encrypted; use https")]
    Open {
        /// What was given.
        url: String,
    },
    /// A file of keys or certificates can't be used.
    #[error("{option} {} has no {what} in PEM", path.display())]
    Pem {
        /// The option that names it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What it should have.
        what: &'static str,
        /// Why it doesn't.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// Key and certificate don't go together, or nobody can be trusted.
    #[error("TLS can't be spoken")]
    Tls(#[from] rustls::Error),
}

/// What a connection is made of.
pub trait Bytes: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Bytes for T {}

/// A connection of any kind.
pub type Stream = Box<dyn Bytes>;

/// Files that a URL needs.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// Authority that the host's certificate is trusted by; the system's when absent.
    pub ca: Option<PathBuf>,
    /// A client's certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// A token.
    pub token: Option<String>,
}

/// The way to one daemon.
#[derive(Clone)]
pub struct Way {
    to: To,
    /// What is shown in each request.
    pub(super) token: Option<String>,
}

#[derive(Clone)]
enum To {
    Socket(PathBuf),
    Tcp {
        host: String,
        port: u16,
        tls: Option<Arc<ClientConfig>>,
    },
}

impl Way {
    /// The daemon that listens on this socket.
    #[must_use]
    pub fn socket(path: &Path) -> Self {
        Self {
            to: To::Socket(path.to_owned()),
            token: None,
        }
    }

    /// The daemon at a URL.
    ///
    /// # Errors
    /// See [`WayError`].
    pub fn url(url: &str, credentials: &Credentials) -> Result<Self, WayError> {
        let wrong = || WayError::Url {
            url: url.to_owned(),
        };
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let host = uri.host().ok_or_else(wrong)?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong());
        }
        let (tls, port) = match uri.scheme_str() {
            Some("https") => (Some(Arc::new(trust(credentials)?)), 443),
            Some("http") if !is_here(host) => {
                return Err(WayError::Open {
                    url: url.to_owned(),
                });
            }
            Some("http") => (None, 80),
            _ => return Err(wrong()),
        };
        Ok(Self {
            to: To::Tcp {
                host: host.trim_matches(['[', ']']).to_owned(),
                port: uri.port_u16().unwrap_or(port),
                tls,
            },
            token: credentials.token.clone(),
        })
    }

    /// A connection.
    pub(super) async fn connect(&self) -> io::Result<Stream> {
        let (host, port, tls) = match &self.to {
            To::Socket(path) => return Ok(Box::new(UnixStream::connect(path).await?)),
            To::Tcp { host, port, tls } => (host, *port, tls),
        };
        let stream = TcpStream::connect((host.as_str(), port)).await?;
        stream.set_nodelay(true)?;
        let Some(tls) = tls else {
            return Ok(Box::new(stream));
        };
        let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
        let connector = TlsConnector::from(tls.clone());
        Ok(Box::new(connector.connect(name, stream).await?))
    }

    /// As a request calls it.
    pub(super) fn authority(&self) -> String {
        match &self.to {
            To::Socket(_) => "thaw".to_owned(),
            To::Tcp { host, port, .. } if host.contains(':') => format!("[{host}]:{port}"),
            To::Tcp { host, port, .. } => format!("{host}:{port}"),
        }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.to {
            To::Socket(path) => path.display().fmt(f),
            To::Tcp { .. } => f.write_str(&self.authority()),
        }
    }
}

impl std::fmt::Debug for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Way({self})")
    }
}

fn is_here(host: &str) -> bool {
    let ip = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
}

/// Whom to believe, and what to show.
fn trust(credentials: &Credentials) -> Result<ClientConfig, WayError> {
    let mut roots = RootCertStore::empty();
    match &credentials.ca {
        Some(path) => roots.add_parsable_certificates(certificates("--ca", path)?),
        None => roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
    };
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let Some((certificate, key)) = &credentials.certificate else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = certificates("--cert", certificate)?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|source| WayError::Pem {
        option: "--key",
        path: key.clone(),
        what: "private key",
        source,
    })?;
    Ok(builder.with_client_auth_cert(chain, key)?)
}

fn certificates(
    option: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, WayError> {
    let failed = |source| WayError::Pem {
        option,
        path: path.to_owned(),
        what: "certificate",
        source,
    };
    let all = CertificateDer::pem_file_iter(path).map_err(failed)?;
    all.collect::<Result<_, _>>().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(url: &str) -> Result<String, String> {
        let way = Way::url(url, &Credentials::default());
        way.map(|way| way.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_url_names_a_host_and_nothing_else() {
        assert_eq!(way("http://127.0.0.1:3000/"), Ok("127.0.0.1:3000".into()));
        assert_eq!(way("http://[::1]:3000"), Ok("[::1]:3000".into()));
        assert_eq!(way("http://localhost"), Ok("localhost:80".into()));
        assert_eq!(way("https://host.example"), Ok("host.example:443".into()));
        for bad in ["host:3000", "https://host/v1", "ftp://host", "https://", ""] {
            assert!(way(bad).unwrap_err().contains("is needed"), "{bad}");
        }
        assert!(way("http://192.0.2.1").unwrap_err().contains("use https"));
    }
}
