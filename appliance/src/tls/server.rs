//! What a listener says in a handshake.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::identity::Identity;
use super::{TlsError, files};

/// What a listener wants of its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Nothing.
    Anybody,
    /// A certificate of this authority counts; there may be none.
    Certified(PathBuf),
    /// No connection without one.
    OnlyCertified(PathBuf),
}

/// A listener's side of TLS 1.2 and 1.3.
///
/// # Errors
/// The authority of clients can't be used.
pub fn server(identity: Arc<Identity>, clients: &Clients) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Server(error.into()))?;
    let builder = match clients {
        Clients::Anybody => builder.with_no_client_auth(),
        Clients::Certified(path) | Clients::OnlyCertified(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in files::certificates(path, &files::read(path)?)? {
                let unfit = |error| files::wrong(path, format!("is no authority: {error}"));
                roots.add(certificate).map_err(unfit)?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = match clients {
                Clients::OnlyCertified(_) => verifier,
                _ => verifier.allow_unauthenticated(),
            };
            let verifier = verifier
                .build()
                .map_err(|error| TlsError::Server(error.into()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(identity);
    // What we speak, so that nobody tries HTTP/2.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
