//! Streams that nobody should import: refused with a reason, and the store as it was.

mod support;

use std::fs;
use std::io::{self, Read};

use snapshot_format::{Build, BuildId, BuildStore, FormatError, ImportOptions, verify};
use support::{id, publish, small_chain, temp_store};
use tar::EntryType;

fn export(store: &BuildStore, build: BuildId) -> Vec<u8> {
    let mut stream = Vec::new();
    store.export(&build, &mut stream, &mut |_| {}).unwrap();
    stream
}

fn import(store: &BuildStore, stream: &[u8]) -> Result<Vec<BuildId>, FormatError> {
    let summary = store.import(stream, &ImportOptions::default())?;
    Ok(summary.published)
}

/// A stream as a list of entries, to be changed.
#[derive(Clone)]
struct Entry {
    name: String,
    kind: EntryType,
    content: Vec<u8>,
}

fn entries(stream: &[u8]) -> Vec<Entry> {
    let mut archive = tar::Archive::new(stream);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let kind = entry.header().entry_type();
        Entry {
            name,
            kind,
            content,
        }
    });
    entries.collect()
}

fn stream(entries: &[Entry]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for Entry {
        name,
        kind,
        content,
    } in entries
    {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_size(content.len() as u64);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        tar.append(&header, content.as_slice()).unwrap();
    }
    tar.into_inner().unwrap()
}

fn small_stream() -> Vec<u8> {
    let (_dir, store) = temp_store();
    small_chain(&store);
    export(&store, id(2))
}

/// The error of importing this, after which the store has to be as it was.
fn refusal(stream: &[u8]) -> FormatError {
    let (_dir, store) = temp_store();
    publish(&store, 77, None, 1, |_| ());
    let error = import(&store, stream).unwrap_err();
    assert_eq!(store.list().unwrap(), [id(77)], "{error}");
    assert_eq!(fs::read_dir(store.root()).unwrap().count(), 1, "{error}");
    error
}

#[test]
fn stream_that_was_taken_apart_and_put_together_is_imported() {
    let (_dir, store) = temp_store();
    import(&store, &stream(&entries(&small_stream()))).unwrap();
    assert!(verify(&store, &id(2)).is_clean());
}

#[test]
fn entry_with_another_name_is_refused_and_nothing_is_written_outside() {
    let good = entries(&small_stream());
    let names = [
        "../../escaped".to_owned(),
        "/tmp/escaped".to_owned(),
        format!("{}/../escaped", id(1)),
        format!("./{}/memory.data", id(1)),
        format!("{}/vmstate", id(3)),
        String::new(),
    ];
    for number in 0..good.len() {
        for name in &names {
            let mut bad = good.clone();
            bad[number].name.clone_from(name);
            let error = refusal(&stream(&bad));
            assert!(
                matches!(error, FormatError::StreamContent { .. }),
                "{error}"
            );
        }
    }
}

#[test]
fn entries_in_another_order_missing_twice_or_behind_the_end_are_refused() {
    let good = entries(&small_stream());
    let refused = |entries: &[Entry]| {
        let error = refusal(&stream(entries));
        let told = matches!(
            error,
            FormatError::StreamContent { .. } | FormatError::StreamTruncated { .. }
        );
        assert!(told, "{error}");
    };
    for number in 0..good.len() {
        let mut bad = good.clone();
        bad.remove(number);
        refused(&bad);
        let mut bad = good.clone();
        bad.insert(number, good[number].clone());
        refused(&bad);
        if number > 0 {
            let mut bad = good.clone();
            bad.swap(number - 1, number);
            refused(&bad);
        }
    }
    let mut bad = good.clone();
    bad.push(good[1].clone());
    refused(&bad);
}

#[test]
fn entry_that_is_no_regular_file_is_refused() {
    let good = entries(&small_stream());
    let kinds = [
        EntryType::Symlink,
        EntryType::Link,
        EntryType::Directory,
        EntryType::Char,
        EntryType::Fifo,
        EntryType::GNUSparse,
        EntryType::GNULongName,
        EntryType::XHeader,
        EntryType::XGlobalHeader,
    ];
    for number in 0..good.len() {
        for kind in kinds {
            let mut bad = good.clone();
            bad[number].kind = kind;
            let error = refusal(&stream(&bad));
            assert!(
                matches!(error, FormatError::StreamContent { .. }),
                "{error}"
            );
        }
    }
}

#[test]
fn stream_cut_anywhere_is_refused() {
    let good = small_stream();
    // The end of the last content; what is behind is padding and the end of the archive.
    let end = good.iter().rposition(|&byte| byte != 0).unwrap();
    for length in (0..=end).step_by(97).chain([end]) {
        let error = refusal(&good[..length]);
        let told = matches!(
            error,
            FormatError::StreamTruncated { .. } | FormatError::Io { .. }
        );
        assert!(told, "{length}: {error}");
    }
}

#[test]
fn flipped_bit_anywhere_in_the_content_is_refused() {
    let good = entries(&small_stream());
    for (number, entry) in good.iter().enumerate() {
        let length = entry.content.len();
        for byte in (0..length).step_by(length / 40 + 1).chain([length - 1]) {
            let mut bad = good.clone();
            bad[number].content[byte] ^= 1;
            refusal(&stream(&bad));
        }
    }
}

#[test]
fn longer_or_shorter_entries_are_refused() {
    let good = entries(&small_stream());
    for number in 0..good.len() {
        let mut longer = good.clone();
        longer[number].content.push(b'x');
        refusal(&stream(&longer));
        let mut shorter = good.clone();
        shorter[number].content.pop();
        refusal(&stream(&shorter));
    }
}

/// Endless zeros behind a header that announces them.
fn announced(name: &str, bytes: u64) -> impl Read {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes);
    header.set_path(name).unwrap();
    header.set_cksum();
    io::Cursor::new(header.as_bytes().to_vec()).chain(io::repeat(0))
}

#[test]
fn endless_index_is_refused_unread() {
    let (_dir, store) = temp_store();
    let endless = announced("export.json", 1 << 60);
    let error = store
        .import(endless, &ImportOptions::default())
        .unwrap_err();
    assert!(
        matches!(error, FormatError::StreamTooLarge { .. }),
        "{error}"
    );
}

#[test]
fn more_bytes_than_allowed_are_refused_by_their_manifest() {
    let (_dir, store) = temp_store();
    let options = ImportOptions { max_bytes: 20_000 };
    let error = store
        .import(small_stream().as_slice(), &options)
        .unwrap_err();
    assert!(
        matches!(error, FormatError::StreamTooLarge { .. }),
        "{error}"
    );
    assert_eq!(store.list().unwrap(), [], "the base was taken back");
    let options = ImportOptions { max_bytes: 40_000 };
    store.import(small_stream().as_slice(), &options).unwrap();
}

/// A stream of build 2 alone, over a base that it doesn't contain.
#[test]
fn map_that_names_a_build_outside_the_stream_is_refused() {
    let whole = entries(&small_stream());
    let index = String::from_utf8(whole[0].content.clone()).unwrap();
    let mut alone = vec![whole[0].clone()];
    let base = format!("    \"{}\",\n", id(1));
    assert!(index.contains(&base), "{index}");
    alone[0].content = index.replace(&base, "").into_bytes();
    let prefix = id(2).to_string();
    alone.extend(
        whole
            .iter()
            .filter(|entry| entry.name.starts_with(&prefix))
            .cloned(),
    );
    let (_dir, store) = temp_store();
    let (victim, _): (Build, _) = small_chain(&store);
    store.remove(&id(2)).unwrap();
    let error = import(&store, &stream(&alone)).unwrap_err();
    assert!(
        matches!(error, FormatError::StreamContent { .. }),
        "{error}"
    );
    assert_eq!(store.list().unwrap(), [victim.id()]);
}
