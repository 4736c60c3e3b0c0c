//! What clients are told of a file.

use buffa_types::google::protobuf::Timestamp;
use rustix::fs::{FileType as Kind, Stat, readlinkat};

use super::error::FileError;
use super::metadata;
use super::path::GuestPath;
use super::place::Place;
use crate::accounts::Names;
use crate::proto::filesystem::{EntryInfo, FileType};

/// Describes what is at a place; `path` is what the client calls it.
pub(super) fn describe(place: &Place, path: &str, names: &Names) -> Result<EntryInfo, FileError> {
    let failed = |e| FileError::new("Reading", path, e);
    let stat = place.stat().map_err(failed)?;
    let mut entry = from_stat(&stat, path, names);
    if Kind::from_raw_mode(stat.st_mode) == Kind::Symlink {
        entry.is_symlink = true;
        let target = readlinkat(&place.directory, &place.name, Vec::new()).map_err(failed)?;
        entry.symlink_target = Some(target.to_string_lossy().into_owned());
        // A link that leads nowhere is a link and nothing else.
        let behind = place.stat_behind().map(|stat| file_type(&stat));
        entry.r#type = behind.unwrap_or(FileType::FILE_TYPE_SYMLINK).into();
    } else {
        entry.metadata = metadata::read(place).into_iter().collect();
    }
    Ok(entry)
}

/// Describes what is at a path.
pub(super) fn at(path: &GuestPath, names: &Names) -> Result<EntryInfo, FileError> {
    describe(&Place::of(path)?, path.as_str(), names)
}

fn from_stat(stat: &Stat, path: &str, names: &Names) -> EntryInfo {
    let name = match path.rsplit_once('/') {
        Some((_, "")) | None => path,
        Some((_, name)) => name,
    };
    EntryInfo {
        name: name.to_owned(),
        r#type: file_type(stat).into(),
        path: path.to_owned(),
        size: stat.st_size,
        mode: stat.st_mode & 0o7777,
        permissions: permissions(stat.st_mode),
        owner: names.user(stat.st_uid),
        group: names.group(stat.st_gid),
        modified_time: Some(Timestamp {
            seconds: stat.st_mtime,
            nanos: i32::try_from(stat.st_mtime_nsec).unwrap_or_default(),
            ..Timestamp::default()
        })
        .into(),
        ..EntryInfo::default()
    }
}

/// Files of other kinds (sockets, devices) have no type in the protocol; their letter is in the
/// permissions.
fn file_type(stat: &Stat) -> FileType {
    match Kind::from_raw_mode(stat.st_mode) {
        Kind::RegularFile => FileType::FILE_TYPE_FILE,
        Kind::Directory => FileType::FILE_TYPE_DIRECTORY,
        Kind::Symlink => FileType::FILE_TYPE_SYMLINK,
        _ => FileType::FILE_TYPE_UNSPECIFIED,
    }
}

/// As Go's `fs.FileMode` prints it, which is what clients of this protocol know: `drwxr-xr-x`,
/// and a link is `L`.
fn permissions(mode: u32) -> String {
    let mut text = String::with_capacity(12);
    let kind = match Kind::from_raw_mode(mode) {
        Kind::Directory => "d",
        Kind::Symlink => "L",
        Kind::Fifo => "p",
        Kind::Socket => "S",
        Kind::BlockDevice => "D",
        Kind::CharacterDevice => "Dc",
        _ => "",
    };
    text.push_str(kind);
    for (bit, letter) in [(0o4000, 'u'), (0o2000, 'g'), (0o1000, 't')] {
        if mode & bit != 0 {
            text.push(letter);
        }
    }
    if text.is_empty() {
        text.push('-');
    }
    for (place, letter) in "rwxrwxrwx".chars().enumerate() {
        let set = mode & (0o400 >> place) != 0;
        text.push(if set { letter } else { '-' });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_in_the_clients_notation() {
        for (mode, text) in [
            (0o100_644, "-rw-r--r--"),
            (0o040_755, "drwxr-xr-x"),
            (0o120_777, "Lrwxrwxrwx"),
            (0o041_777, "dtrwxrwxrwx"),
            (0o104_755, "urwxr-xr-x"),
            (0o010_600, "prw-------"),
            (0o020_620, "Dcrw--w----"),
        ] {
            assert_eq!(permissions(mode), text, "{mode:o}");
        }
    }
}
