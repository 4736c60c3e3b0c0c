//! What is in a directory, down to a depth. Links are listed, never entered.
//!
//! Each directory below the first is opened from the first by a relative path that may not lead
//! out of it nor through a link, so a tree that changes meanwhile can't lead anywhere else, and no
//! descriptor stays open per level.

use std::ffi::CString;

use rustix::fs::{Dir, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::entry;
use super::error::FileError;
use super::path::GuestPath;
use super::place::{Place, open_to_read, retry};
use crate::accounts::Names;
use crate::proto::filesystem::{EntryInfo, FileType};

/// Most entries of one answer.
const MAX_ENTRIES: usize = 100_000;

/// Lists a directory, parents before what is in them and by name among themselves.
pub(super) fn list(
    path: &GuestPath,
    depth: u32,
    names: &Names,
) -> Result<Vec<EntryInfo>, FileError> {
    let root = open_to_read(path)?;
    // Relative paths of directories to be listed, the next one last.
    let mut pending = vec![(String::new(), 1)];
    let mut listed: Vec<(String, EntryInfo)> = Vec::new();
    while let Some((relative, level)) = pending.pop() {
        let here = if relative.is_empty() { "." } else { &relative };
        let directory = match open_below(&root, here) {
            // It went away, or became something else, since its parent was read.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if !relative.is_empty() => continue,
            opened => opened.map_err(|e| FileError::new("Opening", path.as_str(), e))?,
        };
        for name in names_in(&directory).map_err(|e| FileError::new("Listing", path.as_str(), e))? {
            let relative = match relative.as_str() {
                "" => name.clone(),
                above => format!("{above}/{name}"),
            };
            let place = Place {
                directory: directory
                    .try_clone()
                    .map_err(|e| FileError::io("Listing", path.as_str(), &e))?,
                name,
            };
            let entry = match entry::describe(&place, &path.below(&relative), names) {
                Err(FileError::NotFound(_)) => continue,
                entry => entry?,
            };
            let is_directory = entry.r#type == FileType::FILE_TYPE_DIRECTORY && !entry.is_symlink;
            if is_directory && level < depth {
                pending.push((relative.clone(), level + 1));
            }
            if listed.len() == MAX_ENTRIES {
                return Err(FileError::TooMany {
                    path: path.to_string(),
                    limit: MAX_ENTRIES,
                    what: "entries within this depth",
                });
            }
            listed.push((relative, entry));
        }
    }
    // By components: "a/b" comes before "a-b", as a walk through the tree would have it.
    listed.sort_by(|(one, _), (other, _)| one.split('/').cmp(other.split('/')));
    Ok(listed.into_iter().map(|(_, entry)| entry).collect())
}

/// Opens a directory below another, by a path that stays below and has no links.
pub(super) fn open_below(
    root: impl std::os::fd::AsFd,
    relative: &str,
) -> Result<std::os::fd::OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    retry(|| openat2(&root, relative, flags, Mode::empty(), stay))
}

/// The names in a directory; those that aren't UTF-8 have no place in the protocol.
pub(super) fn names_in(directory: impl std::os::fd::AsFd) -> Result<Vec<String>, Errno> {
    let names = raw_names_in(directory)?;
    Ok(names
        .into_iter()
        .filter_map(|name| name.into_string().ok())
        .collect())
}

/// All names in a directory, as they are.
pub(super) fn raw_names_in(directory: impl std::os::fd::AsFd) -> Result<Vec<CString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tree_is_listed_to_its_depth_without_following_links() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir_all(at("a/b/c")).unwrap();
        std::fs::write(at("a-file"), b"12345").unwrap();
        std::fs::write(at("a/b/file"), b"").unwrap();
        std::os::unix::fs::symlink("a", at("link")).unwrap();
        std::os::unix::fs::symlink("nowhere", at("broken")).unwrap();
        let path = GuestPath::resolve(directory.path().to_str().unwrap(), "/").unwrap();
        let names = Names::default();
        let relative = |depth| -> Vec<String> {
            let entries = list(&path, depth, &names).unwrap();
            entries
                .iter()
                .map(|entry| entry.path.strip_prefix(&path.below("")).unwrap().to_owned())
                .collect()
        };
        assert_eq!(relative(1), ["a", "a-file", "broken", "link"]);
        assert_eq!(relative(2), ["a", "a/b", "a-file", "broken", "link"]);
        let all = ["a", "a/b", "a/b/c", "a/b/file", "a-file", "broken", "link"];
        assert_eq!(relative(9), all);

        let entries = list(&path, 1, &names).unwrap();
        assert_eq!(entries[1].size, 5);
        let link = &entries[3];
        assert!(link.is_symlink && link.r#type == FileType::FILE_TYPE_DIRECTORY);
        assert_eq!(link.symlink_target.as_deref(), Some("a"));
        assert_eq!(entries[2].r#type, FileType::FILE_TYPE_SYMLINK);
        assert!(matches!(
            list(&path_of(&path, "a-file"), 1, &names),
            Err(FileError::NotADirectory(_))
        ));
    }

    fn path_of(path: &GuestPath, name: &str) -> GuestPath {
        GuestPath::resolve(&path.below(name), "/").unwrap()
    }
}
