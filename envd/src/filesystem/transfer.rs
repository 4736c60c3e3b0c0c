//! Moving: a rename where that is possible, else a copy that takes its place in one step.
//!
//! A copy is made under a hidden name beside the destination and renamed when it is complete, so
//! the destination is never half there. Owners, modes, times and attributes are copied; hard links
//! become files of their own, and what is neither file, directory nor link can't be copied.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chownat,
    fchmod, fgetxattr, flistxattr, fsetxattr, mkdirat, openat, readlinkat, renameat, statat,
    symlinkat, utimensat,
};
use rustix::io::Errno;

use super::error::FileError;
use super::hidden;
use super::listing::raw_names_in;
use super::place::Place;
use super::removal::remove_at;

/// Deepest tree that is copied: each level is a frame of the stack and two descriptors.
const MAX_DEPTH: usize = 256;

/// Moves what is at one place to another.
pub(super) fn transfer(
    from: &Place,
    to: &Place,
    source: &str,
    target: &str,
) -> Result<(), FileError> {
    match renameat(&from.directory, &from.name, &to.directory, &to.name) {
        Ok(()) => return Ok(()),
        Err(Errno::XDEV) => {}
        // What is in the way isn't the source's fault.
        Err(errno @ (Errno::NOTEMPTY | Errno::ISDIR | Errno::EXIST)) => {
            return Err(FileError::new("Moving to", target, errno));
        }
        Err(errno) => return Err(FileError::new("Moving", source, errno)),
    }
    let hidden = Place {
        directory: to
            .directory
            .try_clone()
            .map_err(|e| FileError::io("Moving to", target, &e))?,
        name: hidden::name(hidden::Replaces::Nothing),
    };
    let copied = copy_place(from, &hidden);
    let moved =
        copied.and_then(|()| renameat(&hidden.directory, &hidden.name, &to.directory, &to.name));
    if let Err(errno) = moved {
        let _ = remove_at(&hidden, target);
        return Err(FileError::new("Copying", source, errno));
    }
    remove_at(from, source)
}

fn copy_place(from: &Place, to: &Place) -> Result<(), Errno> {
    let name = |place: &Place| CString::new(place.name.as_str()).map_err(|_| Errno::INVAL);
    copy(&from.directory, &name(from)?, &to.directory, &name(to)?, 0)
}

fn copy(
    from: impl AsFd,
    name: &CStr,
    to: impl AsFd,
    new: &CStr,
    depth: usize,
) -> Result<(), Errno> {
    let stat = statat(&from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => copy_file(&from, name, &to, new, &stat),
        FileType::Directory if depth < MAX_DEPTH => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let source = openat(&from, name, flags, Mode::empty())?;
            mkdirat(&to, new, Mode::from_raw_mode(0o700))?;
            let target = openat(&to, new, flags, Mode::empty())?;
            for child in raw_names_in(&source)? {
                copy(&source, &child, &target, &child, depth + 1)?;
            }
            copy_attributes(&source, &target, &stat)?;
            finish(&to, new, &stat)
        }
        FileType::Symlink => {
            let target = readlinkat(&from, name, Vec::new())?;
            symlinkat(target, &to, new)?;
            finish(&to, new, &stat)
        }
        _ => Err(Errno::INVAL),
    }
}

fn copy_file(
    from: impl AsFd,
    name: &CStr,
    to: impl AsFd,
    new: &CStr,
    stat: &Stat,
) -> Result<(), Errno> {
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let source: OwnedFd = openat(&from, name, flags | OFlags::RDONLY, Mode::empty())?;
    let create = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    let target: OwnedFd = openat(&to, new, create, Mode::from_raw_mode(0o600))?;
    let (mut source, mut target) = (File::from(source), File::from(target));
    // In the kernel where it can, without holding the file in memory anywhere.
    std::io::copy(&mut source, &mut target)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    copy_attributes(&source, &target, stat)?;
    finish(&to, new, stat)
}

/// Mode and extended attributes of an open file or directory.
fn copy_attributes(source: impl AsFd, target: impl AsFd, stat: &Stat) -> Result<(), Errno> {
    let mut names = vec![0; 65_536];
    // A file system without attributes has none to copy.
    let length = flistxattr(&source, &mut names).unwrap_or(0);
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; 65_536];
        let Ok(length) = fgetxattr(&source, name, &mut value) else {
            continue;
        };
        match fsetxattr(&target, name, &value[..length], XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno),
        }
    }
    fchmod(&target, Mode::from_raw_mode(stat.st_mode & 0o7777))
}

/// Owner and times, last: everything before changes the times.
fn finish(to: impl AsFd, new: &CStr, stat: &Stat) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(&to, new, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    let time = |tv_sec, nanos| Timespec {
        tv_sec,
        tv_nsec: i64::try_from(nanos).unwrap_or_default(),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    utimensat(&to, new, &times, AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
    use std::path::Path;

    use super::super::path::GuestPath;
    use super::*;

    fn place(path: &Path) -> Place {
        Place::of(&GuestPath::resolve(path.to_str().unwrap(), "/").unwrap()).unwrap()
    }

    fn moved(from: &Path, to: &Path) -> Result<(), FileError> {
        transfer(&place(from), &place(to), "source", "target")
    }

    #[test]
    fn tree_moves_to_another_file_system_with_its_modes_times_and_links() {
        let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else {
            let test = "tree_moves_to_another_file_system_with_its_modes_times_and_links";
            return println!("skipped: {test}: no /dev/shm");
        };
        let here = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let tree = here.path().join("tree");
        std::fs::create_dir_all(tree.join("sub")).unwrap();
        std::fs::write(tree.join("sub/file"), vec![7; 300_000]).unwrap();
        std::fs::set_permissions(tree.join("sub/file"), PermissionsExt::from_mode(0o751)).unwrap();
        std::os::unix::fs::symlink("sub/file", tree.join("link")).unwrap();
        let before = std::fs::metadata(tree.join("sub/file")).unwrap();
        if before.dev() == std::fs::metadata(elsewhere.path()).unwrap().dev() {
            let test = "tree_moves_to_another_file_system_with_its_modes_times_and_links";
            return println!("skipped: {test}: only one file system here");
        }

        let target = elsewhere.path().join("moved");
        moved(&tree, &target).unwrap();
        assert!(!tree.exists());
        assert_eq!(
            std::fs::read(target.join("sub/file")).unwrap(),
            vec![7; 300_000]
        );
        let after = std::fs::metadata(target.join("sub/file")).unwrap();
        assert_eq!(
            (after.mode(), after.mtime_nsec()),
            (before.mode(), before.mtime_nsec())
        );
        assert_eq!(
            std::fs::read_link(target.join("link")).unwrap(),
            Path::new("sub/file")
        );
        assert_eq!(
            std::fs::read_dir(elsewhere.path()).unwrap().count(),
            1,
            "nothing hidden is left"
        );

        // A pipe can't be copied: the source stays, and nothing is left at the target.
        let odd = elsewhere.path().join("odd");
        std::fs::create_dir(&odd).unwrap();
        nix::unistd::mkfifo(&odd.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(moved(&odd, &here.path().join("odd")).is_err());
        assert!(odd.join("pipe").exists());
        assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), 0);
    }

    #[test]
    fn full_directory_in_the_way_is_the_targets_fault() {
        let here = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(here.path().join("one")).unwrap();
        std::fs::create_dir_all(here.path().join("two/full")).unwrap();
        let refused = moved(&here.path().join("one"), &here.path().join("two")).unwrap_err();
        assert!(refused.to_string().contains("target"), "{refused}");
        let missing = moved(&here.path().join("none"), &here.path().join("x")).unwrap_err();
        assert_eq!(missing, FileError::NotFound("source".to_owned()));
    }
}
