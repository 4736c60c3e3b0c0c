//! Users of their own for VMMs: one for each slot, without any privilege, instead of the daemon's.
//!
//! ```text
//!   launcher, root     device nodes of the user's over the host's, in the namespace that only the
//!        │             VMM sees; what it prints and is passed belongs to the user
//!        ▼
//!   launcher, user     no groups, no capabilities, no way to new ones
//!        │
//!        ▼
//!   VMM
//! ```
//!
//! Whatever lies in a directory that others can't enter is shown to a VMM at a path of its own
//! ([`Mount`](super::launch::Mount)); the file itself has to be readable by others, or the user's.
//! Whether all of this works on a host is tried out at start.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::prctl;
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{Gid, Uid, fchown, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, FEATURE_MISSING_SHMEM, Uffd};

use super::exit::Exit;
use super::launch::{DIR_PATH, Launch};
use super::process::VmmProcess;

/// What every VMM opens.
pub const KVM: &str = "/dev/kvm";
/// A tap device's way in.
pub const TUN: &str = "/dev/net/tun";
/// A userfaultfd that sees all faults, without the privilege that the system call wants.
pub const USERFAULTFD: &str = "/dev/userfaultfd";

/// The users of this host's VMMs; group and user have the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Users {
    first: u32,
}

impl Users {
    /// `first` is slot 0's; others follow.
    #[must_use]
    pub const fn new(first: u32) -> Self {
        Self { first }
    }

    /// A slot's.
    #[must_use]
    pub const fn of(self, slot: u32) -> u32 {
        self.first.saturating_add(slot)
    }
}

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "as a user of its own per slot, from {} on", self.first)
    }
}

/// Whom a launcher becomes before it executes the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnUser {
    /// User and group.
    pub id: u32,
    /// Devices that it may use, where the host has them.
    pub devices: Vec<PathBuf>,
    /// Whether it has to be able to open a userfaultfd.
    pub faults: bool,
}

impl OwnUser {
    /// Puts device nodes of its own over the host's, in the mount namespace of the caller.
    ///
    /// # Errors
    /// Device nodes can't be made here, or mounted.
    pub(super) fn show_devices(&self) -> io::Result<()> {
        let staging = Path::new(DIR_PATH);
        fs::create_dir_all(staging)?;
        let (kind, none) = (Some("tmpfs"), None::<&str>);
        let options = Some("size=64k,mode=0700");
        mount(kind, staging, kind, MsFlags::MS_NOSUID, options)?;
        for (n, device) in self.devices.iter().enumerate() {
            let found = match fs::metadata(device) {
                Ok(found) if found.file_type().is_char_device() => found,
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let node = staging.join(n.to_string());
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            mknod(&node, SFlag::S_IFCHR, mode, found.rdev())?;
            chown(&node, Some(self.id), Some(self.id))?;
            mount(Some(&node), device, none, MsFlags::MS_BIND, none)?;
        }
        // The nodes stay for as long as they are mounted elsewhere.
        umount2(staging, MntFlags::MNT_DETACH)?;
        Ok(())
    }

    /// Becomes it, for ever.
    ///
    /// # Errors
    /// The caller is not root, or the user gets no userfaultfd and has to.
    pub(super) fn become_it(&self, passed: &[OwnedFd]) -> Result<(), (String, io::Error)> {
        let at = |step: &str| {
            let step = step.to_owned();
            move |error: nix::Error| (step, error.into())
        };
        let (user, group) = (Uid::from_raw(self.id), Gid::from_raw(self.id));
        // It may open these again by their names in /proc.
        let (output, error) = (io::stdout(), io::stderr());
        let all = passed.iter().map(AsFd::as_fd);
        for fd in all.chain([output.as_fd(), error.as_fd()]) {
            fchown(fd, Some(user), Some(group)).map_err(at("giving it its descriptors"))?;
        }
        setgroups(&[]).map_err(at("leaving groups"))?;
        setresgid(group, group, group).map_err(at("becoming its group"))?;
        setresuid(user, user, user).map_err(at("becoming its user"))?;
        prctl::set_no_new_privs().map_err(at("giving up privileges"))?;
        if self.faults {
            let opened = Uffd::create(FEATURE_EVENT_REMOVE | FEATURE_MISSING_SHMEM);
            opened
                .map_err(|error| (format!("opening a userfaultfd as user {}", self.id), error))?;
        }
        Ok(())
    }
}

/// A file of these that a user of its own could not read where it is shown one.
#[must_use]
pub fn unreadable<'a>(files: impl IntoIterator<Item = &'a Path>) -> Option<&'a Path> {
    const BY_OTHERS: u32 = 0o004;
    let is_closed = |path: &&Path| {
        let found = fs::metadata(path);
        found.is_ok_and(|found| found.mode() & BY_OTHERS == 0)
    };
    files.into_iter().find(is_closed)
}

/// Gives a file to a user, if it is there.
///
/// # Errors
/// As `chown(2)`.
pub(super) fn give(path: &Path, user: u32) -> io::Result<()> {
    match chown(path, Some(user), Some(user)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes a directory that only a user can enter, and root.
///
/// # Errors
/// It can't be made.
pub(super) fn make_dir(path: &Path, user: Option<u32>) -> io::Result<()> {
    fs::create_dir_all(path)?;
    let Some(user) = user else { return Ok(()) };
    fs::set_permissions(path, Permissions::from_mode(0o700))?;
    give(path, user)
}

/// Whether a VMM's program starts as such a user, with all that it needs.
///
/// # Errors
/// At what it fails.
pub async fn try_out(program: &Path, user: OwnUser) -> io::Result<()> {
    const PATIENCE: Duration = Duration::from_secs(20);
    let launch = Launch {
        program: program.to_owned(),
        args: vec!["--version".to_owned()],
        env: BTreeMap::new(),
        namespace: None,
        mounts: Vec::new(),
        tap_owner: None,
        cgroup: None,
        user: Some(user),
    };
    let mut process = VmmProcess::start(&launch, &[]).await?;
    let ended = timeout(PATIENCE, process.ended()).await;
    ended.map_err(|_| io::Error::other("it does not say its version"))?;
    process.console().ended(PATIENCE).await;
    match process.exit() {
        // By itself, without an error.
        Some(Exit::Reset) => Ok(()),
        exit => {
            let how = exit.map(|exit| exit.to_string()).unwrap_or_default();
            let said = process.console().tail();
            Err(io::Error::other(format!("{how}; it says: {said}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_has_its_user() {
        let users = Users::new(200_000);
        assert_eq!([0, 7].map(|slot| users.of(slot)), [200_000, 200_007]);
        assert_eq!(Users::new(u32::MAX).of(1), u32::MAX);
        let said = users.to_string();
        assert_eq!(said, "as a user of its own per slot, from 200000 on");
    }

    #[test]
    fn a_file_that_only_its_owner_reads_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, mode| {
            let path = dir.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            path
        };
        let (open, closed) = (file("open", 0o644), file("closed", 0o640));
        assert_eq!(unreadable([open.as_path()]), None);
        let both = [open.as_path(), closed.as_path()];
        assert_eq!(unreadable(both), Some(closed.as_path()));
    }

    #[test]
    fn a_directory_of_a_users_own_is_entered_by_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        make_dir(&path, Some(Uid::effective().as_raw())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert!(give(&dir.path().join("none"), 1).is_ok());
    }
}
