//! The private authority: made at the first start, kept for as long as the data directory is.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use time::{Duration, OffsetDateTime};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::TlsError;
use super::files::{self, Pair};
use super::leaf::{self, About};

/// How long it is good for: whoever trusts it is asked to trust another one only then.
const LIFE: Duration = Duration::days(20 * 365);

/// What makes the host's certificate, and where it is kept.
#[derive(Debug)]
pub(super) struct Authority {
    dir: PathBuf,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    ends: OffsetDateTime,
}

impl Authority {
    /// The one that is kept in this directory, or a new one.
    pub(super) fn open(dir: &Path, now: OffsetDateTime) -> Result<Self, TlsError> {
        files::private_dir(dir)?;
        let path = dir.join("authority.pem");
        let authority = match files::pair(&path)? {
            Some(pair) => Self::kept(dir, &path, pair, now)?,
            None => Self::made(dir, &path, now)?,
        };
        // For clients: without the key.
        let public = pem("CERTIFICATE", &authority.certificate);
        files::write(&dir.join("ca.pem"), 0o644, public.as_bytes())?;
        Ok(authority)
    }

    fn made(dir: &Path, path: &Path, now: OffsetDateTime) -> Result<Self, TlsError> {
        let failed = |source| TlsError::Made {
            names: "an authority".to_owned(),
            source,
        };
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        // Names of two hosts' authorities differ, so that one who trusts both finds the right one.
        let name = format!(
            "Thaw authority {}",
            crate::clock::hex(&crate::clock::random::<4>())
        );
        params.distinguished_name.push(DnType::CommonName, name);
        // It signs certificates of hosts, and no further authority.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = now - Duration::days(1);
        params.not_after = now + LIFE;
        let ends = params.not_after;
        let made = params.self_signed(&key).map_err(failed)?;
        let certificate: CertificateDer<'static> = made.into();
        let both = key.serialize_pem() + &pem("CERTIFICATE", &certificate);
        files::write(path, 0o600, both.as_bytes())?;
        tracing::info!(path = %dir.join("ca.pem").display(), "Made an authority; clients trust it by this file");
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(failed)?;
        Ok(Self {
            dir: dir.to_owned(),
            certificate,
            issuer,
            ends,
        })
    }

    fn kept(dir: &Path, path: &Path, pair: Pair, now: OffsetDateTime) -> Result<Self, TlsError> {
        let what_to_do = "remove it, and a new authority is made that clients have to trust anew";
        let wrong = |problem: String| files::wrong(path, format!("{problem}; {what_to_do}"));
        let Pair { mut chain, key } = pair;
        let certificate = chain.remove(0);
        let about = About::read(&certificate).filter(|about| about.is_ca);
        let about = about.ok_or_else(|| wrong("has no authority's certificate".into()))?;
        if about.not_after <= now {
            return Err(wrong(format!("was good until {}", about.not_after.date())));
        }
        let PrivateKeyDer::Pkcs8(key) = key else {
            return Err(wrong("has no key in PKCS #8".into()));
        };
        let unfit = |error: rcgen::Error| wrong(format!("can't sign: {error}"));
        let key = KeyPair::try_from(&key).map_err(unfit)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(unfit)?;
        Ok(Self {
            dir: dir.to_owned(),
            certificate,
            issuer,
            ends: about.not_after,
        })
    }

    /// The host's certificate for these names: the one that is kept, or a new one where one is due.
    /// The second value says whether it is new.
    pub(super) fn host(
        &self,
        names: &BTreeSet<String>,
        now: OffsetDateTime,
    ) -> Result<(Pair, bool), TlsError> {
        let path = self.dir.join("leaf.pem");
        // One that is damaged is made anew, as one that is missing.
        let kept = files::pair(&path).ok().flatten();
        let about = kept.as_ref().and_then(|kept| About::read(&kept.chain[0]));
        let ours = kept
            .as_ref()
            .is_some_and(|kept| kept.chain.get(1) == Some(&self.certificate));
        let due = leaf::due(about.as_ref(), ours, names, now);
        if let (None, Some(kept)) = (due, kept) {
            return Ok((kept, false));
        }
        let (certificate, key) = leaf::make(&self.issuer, names, now, self.ends)?;
        let text = key.serialize_pem()
            + &pem("CERTIFICATE", &certificate)
            + &pem("CERTIFICATE", &self.certificate);
        files::write(&path, 0o600, text.as_bytes())?;
        tracing::info!(reason = ?due, names = ?names, "Made a certificate for this host");
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let chain = vec![certificate, self.certificate.clone()];
        Ok((Pair { chain, key }, true))
    }
}

/// Source: RFC 7468.
fn pem(label: &str, der: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let text = STANDARD.encode(der);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(64)
        .filter_map(|line| std::str::from_utf8(line).ok())
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(all: &[&str]) -> BTreeSet<String> {
        all.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn an_authority_is_made_once_and_its_key_is_for_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let now = OffsetDateTime::now_utc();
        let first = Authority::open(dir.path(), now).unwrap();
        let second = Authority::open(dir.path(), now).unwrap();
        assert_eq!(first.certificate, second.certificate);
        let mode = |name: &str| {
            fs::metadata(dir.path().join(name))
                .unwrap()
                .permissions()
                .mode()
        };
        assert_eq!(mode("authority.pem") & 0o777, 0o600);
        let public = fs::read(dir.path().join("ca.pem")).unwrap();
        assert!(!String::from_utf8(public).unwrap().contains("KEY"));
        let about = About::read(&first.certificate).unwrap();
        assert!(about.is_ca);
        let later = now + LIFE + Duration::days(1);
        let error = Authority::open(dir.path(), later).unwrap_err().to_string();
        assert!(error.contains("was good until"), "{error}");
    }

    #[test]
    fn a_leaf_is_kept_until_names_or_time_ask_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let now = OffsetDateTime::now_utc();
        let authority = Authority::open(dir.path(), now).unwrap();
        let wanted = names(&["localhost", "127.0.0.1", "::1", "*.thaw.test"]);
        let (first, new) = authority.host(&wanted, now).unwrap();
        assert!(new);
        let about = About::read(&first.chain[0]).unwrap();
        assert!(!about.is_ca, "a leaf can sign nothing");
        assert_eq!(about.names, wanted);
        assert!(about.not_before < now);
        let mode = fs::metadata(dir.path().join("leaf.pem"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);

        let again = Authority::open(dir.path(), now).unwrap();
        let (second, new) = again.host(&wanted, now).unwrap();
        assert!(!new);
        assert_eq!(second.chain, first.chain);
        let (_, new) = again.host(&names(&["localhost"]), now).unwrap();
        assert!(new, "other names");
        let (_, new) = again
            .host(&names(&["localhost"]), now + Duration::days(61))
            .unwrap();
        assert!(new, "near its end");
        fs::write(dir.path().join("leaf.pem"), "damaged").unwrap();
        let (_, new) = again.host(&names(&["localhost"]), now).unwrap();
        assert!(new, "damaged");
    }
}
