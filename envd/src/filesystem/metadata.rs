//! What clients attach to a file: extended attributes below `user.e2b.`.
//!
//! Source: the parameters of `POST /files` in the interface of E2B's envd (0.6.2).

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use rustix::fs::{XattrFlags, fsetxattr, lgetxattr, llistxattr};
use rustix::io::Errno;

use super::place::Place;

/// Where clients' attributes live.
const NAMESPACE: &str = "user.e2b.";
/// Longest key, in bytes: the kernel's limit of a name less the namespace.
const MAX_KEY: usize = 255 - NAMESPACE.len();
/// Most bytes of one file's attributes, names with their namespace included.
const MAX_TOTAL: usize = 4096;

/// Keys and values.
pub(crate) type Metadata = BTreeMap<String, String>;

/// Why these can't be attached; names the key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MetadataError {
    /// Only printable ASCII.
    #[error("Metadata {0:?}: key and value must be printable ASCII, and the key not empty")]
    NotPrintable(String),
    /// The kernel would refuse it.
    #[error("Metadata {0:?}: the key has more than {MAX_KEY} bytes")]
    LongKey(String),
    /// More than fits beside a file.
    #[error("Metadata of {0} bytes is over the limit of {MAX_TOTAL}")]
    TooMuch(usize),
}

/// Judges pairs as they came; of a key that comes twice, the first counts.
pub(crate) fn checked<'a>(
    pairs: impl Iterator<Item = (&'a str, &'a [u8])>,
) -> Result<Metadata, MetadataError> {
    let mut metadata = Metadata::new();
    for (key, value) in pairs {
        let printable = |bytes: &[u8]| bytes.iter().all(|b| (0x20..=0x7e).contains(b));
        let Ok(text) = std::str::from_utf8(value) else {
            return Err(MetadataError::NotPrintable(key.to_owned()));
        };
        if key.is_empty() || !printable(key.as_bytes()) || !printable(value) {
            return Err(MetadataError::NotPrintable(key.to_owned()));
        }
        if key.len() > MAX_KEY {
            return Err(MetadataError::LongKey(key.to_owned()));
        }
        metadata
            .entry(key.to_ascii_lowercase())
            .or_insert_with(|| text.to_owned());
    }
    let lengths = metadata
        .iter()
        .map(|(key, value)| NAMESPACE.len() + key.len() + value.len());
    match lengths.sum() {
        total if total > MAX_TOTAL => Err(MetadataError::TooMuch(total)),
        _ => Ok(metadata),
    }
}

/// Attaches to a file that has none.
pub(crate) fn write(file: impl AsFd, metadata: &Metadata) -> Result<(), Errno> {
    for (key, value) in metadata {
        let name = format!("{NAMESPACE}{key}");
        fsetxattr(&file, name, value.as_bytes(), XattrFlags::empty())?;
    }
    Ok(())
}

/// What is attached at a place; nothing where the file system has no such thing.
pub(super) fn read(place: &Place) -> Metadata {
    let path = place.proc_path();
    let mut names = vec![0; 4096];
    let Ok(length) = llistxattr(&path, &mut names) else {
        return Metadata::new();
    };
    let names = names[..length].split(|byte| *byte == 0);
    let pairs = names.filter_map(|name| {
        let name = std::str::from_utf8(name).ok()?;
        let key = name.strip_prefix(NAMESPACE)?;
        let mut value = vec![0; MAX_TOTAL];
        let length = lgetxattr(&path, name, &mut value).ok()?;
        value.truncate(length);
        Some((key.to_owned(), String::from_utf8(value).ok()?))
    });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_of_a_key_counts_and_limits_hold() {
        let judge = |pairs: &[(&str, &str)]| {
            checked(pairs.iter().map(|(key, value)| (*key, value.as_bytes())))
        };
        let both = judge(&[("Owner", "a"), ("owner", "b"), ("x", "")]).unwrap();
        assert_eq!(
            both,
            [
                ("owner".to_owned(), "a".to_owned()),
                ("x".to_owned(), String::new())
            ]
            .into()
        );
        for bad in [("", "v"), ("k\u{e4}", "v"), ("k", "a\nb"), ("k", "\u{e4}")] {
            assert_eq!(
                judge(&[bad]),
                Err(MetadataError::NotPrintable(bad.0.to_owned()))
            );
        }
        let long = "k".repeat(247);
        assert_eq!(
            judge(&[(&long, "")]),
            Err(MetadataError::LongKey(long.clone()))
        );
        assert!(judge(&[(&long[..246], "")]).is_ok());
        assert_eq!(
            judge(&[("k", &"v".repeat(4087))]),
            Err(MetadataError::TooMuch(4097))
        );
    }
}
