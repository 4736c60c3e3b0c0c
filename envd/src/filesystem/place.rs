//! A name in an open directory: what every operation acts on, so that nobody can exchange the
//! directory between our looking and our acting.
//!
//! Directories are opened with openat2 and without magic links: /proc/self/fd and the like would
//! lead out through the daemon's own descriptors.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, chownat, mkdirat, openat2,
    readlinkat, statat,
};
use rustix::io::Errno;

use super::error::FileError;
use super::owner::Owner;
use super::path::GuestPath;

/// How a directory is opened that is only gone through.
pub(super) const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// As many symbolic links as the kernel follows. Source: `MAXSYMLINKS`.
const MAX_LINKS: usize = 40;

/// A name in a directory; the name is a single component, and may be free.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) directory: OwnedFd,
    pub(crate) name: String,
}

impl Place {
    /// The place of a path. Links on the way to its directory are followed, one at its end is not.
    pub(crate) fn of(path: &GuestPath) -> Result<Place, FileError> {
        // The root is its own place.
        let (directory, name) = path.split().unwrap_or(("/", "."));
        let opened = open_directory(CWD, directory, DIRECTORY);
        Ok(Place {
            directory: opened.map_err(|e| FileError::new("Opening", path.as_str(), e))?,
            name: name.to_owned(),
        })
    }

    /// The place of a path, whose missing directories are made for the owner.
    pub(crate) fn made(path: &GuestPath, owner: &Owner) -> Result<Place, FileError> {
        match Place::of(path) {
            Err(FileError::NotFound(_)) => {}
            found => return found,
        }
        if let Some((directory, _)) = path.split() {
            make_directories(&GuestPath::resolve(directory, "/")?, owner)?;
        }
        Place::of(path)
    }

    /// Where the link at this place leads in the end, if there is one: that, too, as a place.
    pub(crate) fn behind_links(mut self) -> Result<Place, Errno> {
        for _ in 0..MAX_LINKS {
            let target = match readlinkat(&self.directory, &self.name, Vec::new()) {
                // Not a link, or nothing at all.
                Err(Errno::INVAL | Errno::NOENT) => return Ok(self),
                target => target?,
            };
            let target = target.into_string().map_err(|_| Errno::ILSEQ)?;
            let (directory, name) = match target.rsplit_once('/') {
                Some(("", name)) => ("/", name),
                Some((directory, name)) => (directory, name),
                None => (".", target.as_str()),
            };
            if matches!(name, "" | "." | "..") {
                return Err(Errno::ISDIR);
            }
            let name = name.to_owned();
            let directory = open_directory(self.directory.as_fd(), directory, DIRECTORY)?;
            self = Place { directory, name };
        }
        Err(Errno::LOOP)
    }

    /// What is here, not what a link here leads to.
    pub(crate) fn stat(&self) -> Result<Stat, Errno> {
        statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// What a link here leads to.
    pub(crate) fn stat_behind(&self) -> Result<Stat, Errno> {
        statat(&self.directory, &self.name, AtFlags::empty())
    }

    /// A path for calls that know no directory descriptors. It leads through our own one, so it
    /// means the same place whatever happens to the directory's name.
    pub(crate) fn proc_path(&self) -> PathBuf {
        let directory = self.directory.as_raw_fd();
        PathBuf::from(format!("/proc/self/fd/{directory}/{}", self.name))
    }
}

/// Opens a directory, following links but not magic ones.
pub(crate) fn open_directory(
    from: impl std::os::fd::AsFd,
    path: &str,
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    retry(|| {
        openat2(
            &from,
            path,
            flags,
            Mode::empty(),
            ResolveFlags::NO_MAGICLINKS,
        )
    })
}

/// Opens a directory to be read.
pub(crate) fn open_to_read(path: &GuestPath) -> Result<OwnedFd, FileError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open_directory(CWD, path.as_str(), flags)
        .map_err(|e| FileError::new("Opening", path.as_str(), e))
}

/// Makes a directory and what is missing above it; `false` when it was there.
pub(crate) fn make_directories(path: &GuestPath, owner: &Owner) -> Result<bool, FileError> {
    let failed = |e| FileError::new("Making directory", path.as_str(), e);
    let mut here = open_directory(CWD, "/", DIRECTORY).map_err(failed)?;
    let mut made = false;
    for name in path.components() {
        here = match open_directory(here.as_fd(), name, DIRECTORY) {
            Err(Errno::NOENT) => {
                let directory = make_directory(&here, name, owner);
                made = true;
                directory.map_err(failed)?
            }
            opened => opened.map_err(failed)?,
        };
    }
    Ok(made)
}

fn make_directory(parent: &OwnedFd, name: &str, owner: &Owner) -> Result<OwnedFd, Errno> {
    match mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        // Somebody else was faster, which is as good.
        Err(Errno::EXIST) => return open_directory(parent, name, DIRECTORY),
        made => made?,
    }
    // Not through a link that somebody has put in its place.
    let made = openat2(
        parent,
        name,
        DIRECTORY | OFlags::NOFOLLOW,
        Mode::empty(),
        ResolveFlags::NO_MAGICLINKS,
    )?;
    if let Some((uid, gid)) = owner.ids() {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        chownat(&made, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    }
    Ok(made)
}

/// Whether it is a directory.
pub(crate) fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// openat2 gives EAGAIN when a rename elsewhere disturbed it, and EINTR as everybody.
pub(super) fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::AGAIN | Errno::INTR) => {}
            done => return done,
        }
    }
}
