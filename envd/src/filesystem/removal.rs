//! Removing a file, or a directory with everything in it.

use rustix::io::Errno;

use super::error::FileError;
use super::path::GuestPath;
use super::place::{Place, is_directory};

/// Removes what is at a path; a link, not what it leads to. Nothing there is fine, too.
pub(super) fn remove(path: &GuestPath) -> Result<(), FileError> {
    if path.split().is_none() {
        return Err(FileError::Unsuitable {
            path: path.to_string(),
            reason: "the root can't be removed",
        });
    }
    match Place::of(path).and_then(|place| remove_at(&place, path.as_str())) {
        Err(FileError::NotFound(_)) => Ok(()),
        done => done,
    }
}

/// Removes what is at a place.
pub(super) fn remove_at(place: &Place, path: &str) -> Result<(), FileError> {
    let stat = place
        .stat()
        .map_err(|e| FileError::new("Removing", path, e))?;
    // Both go through the place's own descriptor, and the standard library's walk through a tree
    // is safe against links that are put in its way.
    let removed = if is_directory(&stat) {
        std::fs::remove_dir_all(place.proc_path())
    } else {
        std::fs::remove_file(place.proc_path())
    };
    match removed {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Ok(()),
        removed => removed.map_err(|e| FileError::io("Removing", path, &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_is_removed_and_what_it_leads_to_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let text = directory.path().join(name);
            GuestPath::resolve(text.to_str().unwrap(), "/").unwrap()
        };
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir_all(at("tree/sub")).unwrap();
        std::fs::write(at("kept"), b"").unwrap();
        std::os::unix::fs::symlink(directory.path(), at("tree/sub/up")).unwrap();
        std::os::unix::fs::symlink(at("tree"), at("link")).unwrap();

        remove(&path("link")).unwrap();
        assert!(at("tree/sub").is_dir());
        remove(&path("tree")).unwrap();
        assert!(!at("tree").exists() && at("kept").exists());
        remove(&path("tree")).unwrap();
        remove(&path("no/such/directory")).unwrap();
        assert!(remove(&GuestPath::resolve("/", "/").unwrap()).is_err());
    }
}
