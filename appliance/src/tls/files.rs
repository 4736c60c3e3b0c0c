//! Keys and certificates on disk: one PEM file holds a key and its certificates, so that there is
//! never one without the other.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::TlsError;

/// A key, and the certificates that lead from it to an authority.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

/// The text of a file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| at(path, source))
}

/// All certificates of a PEM text, at least one.
pub(super) fn certificates(
    path: &Path,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(wrong(path, "has no certificate; PEM is needed".to_owned())),
        Err(error) => Err(wrong(path, format!("is no PEM: {error}"))),
    }
}

/// The key of a PEM text.
pub(super) fn key(path: &Path, text: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(text)
        .map_err(|error| wrong(path, format!("has no private key in PEM: {error}")))
}

/// A file of ours; nothing when there is none.
pub(super) fn pair(path: &Path) -> Result<Option<Pair>, TlsError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(path, error)),
    };
    let (chain, key) = (certificates(path, &text)?, key(path, &text)?);
    Ok(Some(Pair { chain, key }))
}

/// A directory that nobody else looks into.
pub(super) fn private_dir(path: &Path) -> Result<(), TlsError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| at(path, source))
}

/// Writes a file that is there with all of its content, or as it was before.
pub(super) fn write(path: &Path, mode: u32, content: &[u8]) -> Result<(), TlsError> {
    let write = || {
        let next = path.with_extension("new");
        // What a crash has left may have another mode.
        let _ = fs::remove_file(&next);
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&next)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&next, path)?;
        path.parent()
            .map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    };
    write().map_err(|source| at(path, source))
}

pub(super) fn at(path: &Path, source: io::Error) -> TlsError {
    TlsError::File {
        path: path.to_owned(),
        source,
    }
}

pub(super) fn wrong(path: &Path, problem: String) -> TlsError {
    TlsError::Content {
        path: path.to_owned(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_written_has_its_mode_from_the_first_byte() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("tls");
        private_dir(&inner).unwrap();
        assert_eq!(
            fs::metadata(&inner).unwrap().permissions().mode() & 0o777,
            0o700
        );
        let path = inner.join("leaf.pem");
        for content in ["one", "two"] {
            write(&path, 0o600, content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
            assert_eq!(
                fs::metadata(&path).unwrap().permissions().mode() & 0o777,
                0o600
            );
        }
    }

    #[test]
    fn a_file_that_is_no_pem_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.pem");
        assert!(pair(&path).unwrap().is_none());
        fs::write(&path, "nonsense").unwrap();
        let error = pair(&path).unwrap_err().to_string();
        assert!(
            error.contains("mine.pem") && error.contains("no certificate"),
            "{error}"
        );
    }
}
