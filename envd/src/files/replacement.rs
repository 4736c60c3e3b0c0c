//! Writing a file so that it is there completely or not at all: under a hidden name beside its
//! place, and renamed when it is done.
//!
//! A file that is replaced keeps its permissions; what it is a link to is replaced, not the link.

use std::fs::File;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RawMode, Uid, fchmod, fchown, fstatvfs, openat, renameat,
    unlinkat,
};
use rustix::io::Errno;

use crate::filesystem::hidden::{self, Replaces};
use crate::filesystem::{FileError, GuestPath, Metadata, Owner, Place, write_metadata};

/// Permissions of a file that is new.
const USUAL_MODE: RawMode = 0o644;

/// A file that isn't there yet. Dropped before it is committed, it never will be.
#[derive(Debug)]
pub(super) struct Replacement {
    file: File,
    /// What the client calls it.
    path: String,
    place: Place,
    hidden: Option<String>,
    mode: RawMode,
}

impl Replacement {
    /// Begins a file of about that many bytes for an owner, making the directories that are missing.
    pub(super) fn begin(
        path: &GuestPath,
        owner: &Owner,
        bytes: u64,
    ) -> Result<Replacement, FileError> {
        let failed = |errno| FileError::new("Writing", path.as_str(), errno);
        let place = Place::made(path, owner)?.behind_links().map_err(failed)?;
        let (replaces, mode) = match place.stat() {
            Err(Errno::NOENT) => (Replaces::Nothing, USUAL_MODE),
            stat => {
                let stat = stat.map_err(failed)?;
                judge(stat.st_mode, path)?;
                (Replaces::File, stat.st_mode & 0o777)
            }
        };
        let space = fstatvfs(&place.directory).map_err(failed)?;
        if space.f_bfree.saturating_mul(space.f_frsize) < bytes {
            return Err(failed(Errno::NOSPC));
        }
        let hidden = hidden::name(replaces);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&place.directory, &hidden, flags, Mode::RUSR | Mode::WUSR);
        let replacement = Replacement {
            file: File::from(file.map_err(failed)?),
            path: path.to_string(),
            place,
            hidden: Some(hidden),
            mode,
        };
        if let Some((uid, gid)) = owner.ids() {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            fchown(&replacement.file, Some(uid), Some(gid)).map_err(failed)?;
        }
        Ok(replacement)
    }

    /// To be written to.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// What an error of writing to it means.
    pub(super) fn failed(&self, error: &std::io::Error) -> FileError {
        FileError::io("Writing", &self.path, error)
    }

    /// Puts it in its place.
    pub(super) fn commit(mut self, metadata: &Metadata) -> Result<(), FileError> {
        let failed = |errno| FileError::new("Writing", &self.path, errno);
        write_metadata(&self.file, metadata).map_err(failed)?;
        fchmod(&self.file, Mode::from_raw_mode(self.mode)).map_err(failed)?;
        if let Some(hidden) = &self.hidden {
            let directory = &self.place.directory;
            renameat(directory, hidden, directory, &self.place.name).map_err(failed)?;
        }
        self.hidden = None;
        Ok(())
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            // Nothing more can be done about one that stays.
            let _ = unlinkat(&self.place.directory, hidden, AtFlags::empty());
        }
    }
}

/// Only files are replaced.
fn judge(mode: RawMode, path: &GuestPath) -> Result<(), FileError> {
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(FileError::IsADirectory(path.to_string())),
        _ => Err(FileError::Unsuitable {
            path: path.to_string(),
            reason: "not a regular file",
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    use super::*;
    use crate::accounts::Accounts;
    use crate::settings::Values;

    fn begin(path: &Path) -> Result<Replacement, FileError> {
        let owner = Owner::of(None, &Values::default(), &Accounts::default()).unwrap();
        Replacement::begin(&owner.path(path.to_str().unwrap())?, &owner, 1)
    }

    fn write(path: &Path, text: &str) {
        let replacement = begin(path).unwrap();
        replacement.file().write_all(text.as_bytes()).unwrap();
        replacement.commit(&Metadata::new()).unwrap();
    }

    #[test]
    fn file_is_there_completely_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a/b/file");
        let unfinished = begin(&file).unwrap();
        unfinished.file().write_all(b"half").unwrap();
        assert!(!file.exists());
        drop(unfinished);
        assert_eq!(
            std::fs::read_dir(file.parent().unwrap()).unwrap().count(),
            0
        );
        write(&file, "whole");
        drop(begin(&file).unwrap());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "whole");
    }

    #[test]
    fn replaced_file_keeps_its_mode_and_links_lead_to_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir(at("sub")).unwrap();
        write(&at("sub/file"), "old");
        std::fs::set_permissions(at("sub/file"), PermissionsExt::from_mode(0o750)).unwrap();
        symlink("sub/file", at("link")).unwrap();
        symlink(at("link"), at("link-to-link")).unwrap();
        write(&at("link-to-link"), "new");
        assert!(at("link").is_symlink() && at("link-to-link").is_symlink());
        assert_eq!(std::fs::read_to_string(at("sub/file")).unwrap(), "new");
        let mode = std::fs::metadata(at("sub/file"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o750);
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        symlink("loop", at("loop")).unwrap();
        symlink(".", at("here")).unwrap();
        assert!(matches!(
            begin(directory.path()),
            Err(FileError::IsADirectory(_))
        ));
        assert!(matches!(
            begin(&at("here")),
            Err(FileError::IsADirectory(_))
        ));
        assert!(matches!(
            begin(&at("pipe")),
            Err(FileError::Unsuitable { .. })
        ));
        assert!(matches!(
            begin(&at("loop")),
            Err(FileError::Unsuitable { .. })
        ));
        assert!(matches!(
            begin(&at("pipe/x")),
            Err(FileError::NotADirectory(_))
        ));
        // Magic links would lead out through our own descriptors.
        assert!(begin(Path::new("/proc/self/root/tmp/x")).is_err());
    }

    #[test]
    fn file_that_cannot_fit_is_refused_before_it_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let owner = Owner::of(None, &Values::default(), &Accounts::default()).unwrap();
        let path = owner
            .path(directory.path().join("big").to_str().unwrap())
            .unwrap();
        let refused = Replacement::begin(&path, &owner, u64::MAX / 2);
        assert!(matches!(refused, Err(FileError::NoSpace { .. })));
    }
}
