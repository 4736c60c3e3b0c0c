//! The certificate that listeners show now. It is looked at again while the daemon runs: ours is
//! renewed before it ends, and files of the operator's are read again when they have changed.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;
use time::OffsetDateTime;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;

use super::TlsError;
use super::authority::Authority;
use super::files::{self, Pair};
use super::leaf::About;
use crate::config::Config;

/// Where it comes from.
#[derive(Debug)]
enum Source {
    /// Files of the operator's.
    Files { certificate: PathBuf, key: PathBuf },
    /// Our own authority, for these names.
    Ours {
        authority: Box<Authority>,
        names: BTreeSet<String>,
    },
}

/// What the host shows to clients.
#[derive(Debug)]
pub struct Identity {
    source: Source,
    now: RwLock<Arc<CertifiedKey>>,
}

impl Identity {
    /// The one that the configuration describes.
    ///
    /// # Errors
    /// A file is missing, can't be used, or has ended.
    pub fn open(config: &Config) -> Result<Arc<Self>, TlsError> {
        let source = match (&config.tls.certificate, &config.tls.key) {
            (Some(certificate), Some(key)) => Source::Files {
                certificate: certificate.clone(),
                key: key.clone(),
            },
            _ => Source::Ours {
                authority: Box::new(Authority::open(
                    &config.data_dir.join("tls"),
                    OffsetDateTime::now_utc(),
                )?),
                names: config.tls_names(),
            },
        };
        let first = source.load(OffsetDateTime::now_utc())?;
        let now = RwLock::new(Arc::new(first));
        Ok(Arc::new(Self { source, now }))
    }

    /// Looks again. Connections that exist keep what they were shown.
    ///
    /// # Errors
    /// As of [`Self::open`]; what was shown before is shown still.
    pub fn refresh(&self) -> Result<(), TlsError> {
        let next = self.source.load(OffsetDateTime::now_utc())?;
        let mut now = self.now.write();
        if next.cert != now.cert {
            *now = Arc::new(next);
            tracing::info!("Another certificate is shown from now on");
        }
        Ok(())
    }
}

impl ResolvesServerCert for Identity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.now.read().clone())
    }
}

impl Source {
    fn load(&self, now: OffsetDateTime) -> Result<CertifiedKey, TlsError> {
        let (path, pair) = match self {
            Self::Files { certificate, key } => {
                let chain = files::certificates(certificate, &files::read(certificate)?)?;
                let end = About::read(&chain[0]).map(|about| about.not_after);
                if let Some(end) = end.filter(|end| *end <= now) {
                    let problem = format!("was good until {}; set tls.certificate", end.date());
                    return Err(files::wrong(certificate, problem));
                }
                let key = files::key(key, &files::read(key)?)?;
                (certificate.clone(), Pair { chain, key })
            }
            Self::Ours { authority, names } => {
                let (pair, _) = authority.host(names, now)?;
                (PathBuf::from("leaf.pem"), pair)
            }
        };
        CertifiedKey::from_der(pair.chain, pair.key, &default_provider())
            .map_err(|error| files::wrong(&path, format!("doesn't go with its key: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn config(text: &str) -> Config {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn files_of_the_operators_are_read_again_when_they_change() {
        let dir = tempfile::tempdir().unwrap();
        let made = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            rcgen::generate_simple_self_signed(names).unwrap()
        };
        let put = |made: &rcgen::CertifiedKey<rcgen::KeyPair>| {
            fs::write(dir.path().join("c.pem"), made.cert.pem()).unwrap();
            fs::write(dir.path().join("k.pem"), made.signing_key.serialize_pem()).unwrap();
        };
        let (one, two) = (made(&["one"]), made(&["two"]));
        put(&one);
        let text = format!(
            "[tls]\ncertificate = \"{0}/c.pem\"\nkey = \"{0}/k.pem\"\n",
            dir.path().display()
        );
        let identity = Identity::open(&config(&text)).unwrap();
        assert_eq!(identity.now.read().cert[0], *one.cert.der());
        put(&two);
        identity.refresh().unwrap();
        assert_eq!(identity.now.read().cert[0], *two.cert.der());
        // A certificate without its key is no reason to show nothing.
        fs::write(dir.path().join("c.pem"), one.cert.pem()).unwrap();
        let error = identity.refresh().unwrap_err().to_string();
        assert!(error.contains("doesn't go with its key"), "{error}");
        assert_eq!(identity.now.read().cert[0], *two.cert.der());
    }
}
