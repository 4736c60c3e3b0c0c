//! Network namespaces by name: made on a thread of their own, kept by a bind mount under
//! `/run/netns`, where `ip netns` finds them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

const DIRECTORY: &str = "/run/netns";

/// Where a namespace of this name is kept.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// Runs `inside` with the calling thread in a new namespace kept under `name`, and
/// brings the thread back.
///
/// # Errors
/// The namespace can't be made, or `inside` failed; then it is not kept.
pub fn create<T>(name: &str, inside: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    make_directory()?;
    let path = path(name);
    File::create_new(&path)?;
    let home = File::open("/proc/thread-self/ns/net")?;
    let made = unshare(CloneFlags::CLONE_NEWNET)
        .and_then(|()| {
            let none: Option<&str> = None;
            mount(
                Some("/proc/thread-self/ns/net"),
                &path,
                none,
                MsFlags::MS_BIND,
                none,
            )
        })
        .map_err(io::Error::from)
        .and_then(|()| inside());
    go_home(&home);
    if made.is_err() {
        let _ = remove(name);
    }
    made
}

/// Makes the directory as `ip netns add` does: a mount of its own, shared. Were it that who comes
/// first, it would cover the mounts that are there, and nobody could remove those any more (`EBUSY`).
///
/// Source: `create_netns_dir` and `netns_add` in iproute2 6.1's `ip/ipnetns.c`, whose lock this is, too.
fn make_directory() -> io::Result<()> {
    fs::create_dir_all(DIRECTORY)?;
    let lock = File::open(DIRECTORY)?;
    lock.lock()?;
    let none: Option<&str> = None;
    let share = || {
        let flags = MsFlags::MS_SHARED | MsFlags::MS_REC;
        mount(none, DIRECTORY, none, flags, none)
    };
    if share() == Err(nix::Error::EINVAL) {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(DIRECTORY), DIRECTORY, none, flags, none)?;
        share()?;
    }
    Ok(())
}

/// Runs `inside` with the calling thread in a kept namespace, and brings the thread back.
///
/// # Errors
/// There is no namespace of this name, or `inside` failed.
pub fn within<T>(name: &str, inside: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let (there, home) = (
        File::open(path(name))?,
        File::open("/proc/thread-self/ns/net")?,
    );
    setns(&there, CloneFlags::CLONE_NEWNET)?;
    let result = inside();
    go_home(&home);
    result
}

fn go_home(home: &File) {
    setns(home, CloneFlags::CLONE_NEWNET)
        .unwrap_or_else(|error| panic!("the slot thread lost its own namespace: {error}"));
}

/// Lets go of a namespace; the kernel ends it when its last process has.
///
/// # Errors
/// As `umount2(2)` and `unlink(2)`; a name that isn't there is no error.
pub fn remove(name: &str) -> io::Result<()> {
    let path = path(name);
    match umount2(&path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The kept namespaces whose name starts with `prefix`.
///
/// # Errors
/// The directory can't be read.
pub fn list(prefix: &str) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry?.file_name().into_string()
            && name.starts_with(prefix)
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
