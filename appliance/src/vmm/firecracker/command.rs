//! How a Firecracker is started, as a value: by itself, or by its jailer.
//!
//! ```text
//!   on the host             without a jailer        in the jail
//!   <run_dir>/vmm/          the same path           /run/         sockets, the state to load
//!                           …/vmm/save/             /save/        what it writes; memory of its own
//!   <run_dir>/vmm/          /run/thaw-vmm           /run/thaw-vmm, for what is in device states
//!   the sandbox's disk      /run/thaw-disk          /run/thaw-disk
//!   kernel, initrd          the same paths          /kernel, /initrd
//! ```
//!
//! The disk's path is in the device state, so it is the same for all of them, and a state that
//! was saved in a jail is loaded outside of one and the other way round. The jail lies in memory
//! that only the VMM sees and that goes with it; devices work there wherever `/run` is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::network::address::TAP;
use crate::vmm::Place;
use crate::vmm::cgroup::Cgroup;
use crate::vmm::launch::{Launch, Mount};

/// Everything of a jail besides memory that is saved: the program, above all.
const JAIL_BYTES: u64 = 64 << 20;
/// A device state, and what a file system needs beside it.
const STATE_BYTES: u64 = 64 << 20;
/// The name that the jailer gives the jail's directory.
const JAIL_ID: &str = "vm";

/// A jailer, and whom it makes of its VMMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jailer {
    /// The program.
    pub program: PathBuf,
    /// The user and group of slot 0's VMM; others follow.
    pub first_user: u32,
}

/// Where the parts of one machine are, on the host and as its VMM finds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// The host's directory for sockets and the state to load.
    pub(super) dir: PathBuf,
    /// The same directory, as the VMM finds it.
    dir_inside: PathBuf,
    /// Where the VMM writes; not seen on the host but through its process.
    save_inside: PathBuf,
    /// Who the VMM is.
    pub(super) user: u32,
    /// The jail's root as the launcher finds it.
    jail: Option<PathBuf>,
}

/// What one machine needs besides its place.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    /// As an ELF file, with its initial RAM disk; only a boot has these.
    pub(super) kernel: Option<&'a Path>,
    pub(super) initrd: Option<&'a Path>,
    /// The disk; a probe has none.
    pub(super) disk: Option<&'a Path>,
    /// The namespace with its tap device; a probe has none.
    pub(super) namespace: Option<&'a Path>,
    /// What a save may take.
    pub(super) memory_bytes: u64,
    /// The control group; a probe has none.
    pub(super) cgroup: Option<&'a Cgroup>,
}

impl Layout {
    pub(super) fn new(run_dir: &Path, slot: u32, program: &Path, jailer: Option<&Jailer>) -> Self {
        let dir = run_dir.join("vmm");
        match jailer {
            None => Self {
                dir_inside: dir.clone(),
                save_inside: dir.join("save"),
                dir,
                user: 0,
                jail: None,
            },
            Some(jailer) => {
                let name = program.file_name().unwrap_or_default();
                let base = run_dir.join("jail");
                Self {
                    dir,
                    dir_inside: "/run".into(),
                    save_inside: "/save".into(),
                    user: jailer.first_user.saturating_add(slot),
                    jail: Some(base.join(name).join(JAIL_ID).join("root")),
                }
            }
        }
    }

    pub(super) fn of(place: &Place, program: &Path, jailer: Option<&Jailer>) -> Self {
        Self::new(&place.run_dir, place.slot, program, jailer)
    }

    /// A file of the host's directory as the VMM finds it.
    pub(super) fn inside(&self, name: &str) -> PathBuf {
        self.dir_inside.join(name)
    }

    /// Where the device state to load is, on the host.
    pub(super) fn state(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    /// Where the VMM writes, as it finds it.
    pub(super) fn save_dir(&self) -> &Path {
        &self.save_inside
    }

    /// How much it may write for a guest of this size.
    pub(super) const fn save_bytes(memory_bytes: u64) -> u64 {
        memory_bytes + STATE_BYTES
    }

    /// A file that the VMM writes, as it finds it.
    pub(super) fn saved(&self, name: &str) -> PathBuf {
        self.save_inside.join(name)
    }

    /// The same file through its process.
    pub(super) fn saved_by(&self, pid: i32, name: &str) -> PathBuf {
        let inside = self.saved(name);
        let below_root = inside.strip_prefix("/").unwrap_or(&inside);
        Path::new("/proc")
            .join(pid.to_string())
            .join("root")
            .join(below_root)
    }

    /// The kernel and the initial RAM disk as the VMM finds them.
    pub(super) fn kernel<'a>(&self, on_host: &'a Path) -> &'a Path {
        self.jail.as_ref().map_or(on_host, |_| Path::new("/kernel"))
    }

    pub(super) fn initrd<'a>(&self, on_host: &'a Path) -> &'a Path {
        self.jail.as_ref().map_or(on_host, |_| Path::new("/initrd"))
    }

    /// The launch of one Firecracker.
    pub(super) fn launch(
        &self,
        program: &Path,
        jailer: Option<&Jailer>,
        parts: &Parts<'_>,
    ) -> Launch {
        let own = ["--api-sock", "--level", "--show-level"];
        let socket = self.inside(SOCKET).to_string_lossy().into_owned();
        let mut own = vec![
            own[0].to_owned(),
            socket,
            own[1].to_owned(),
            "Warning".to_owned(),
            own[2].to_owned(),
        ];
        let (program, args) = match (jailer, &self.jail) {
            (Some(jailer), Some(root)) => {
                let base = root.ancestors().nth(3).unwrap_or(root);
                let user = self.user.to_string();
                let mut args: Vec<String> = [
                    "--id",
                    JAIL_ID,
                    "--exec-file",
                    &program.to_string_lossy(),
                    "--uid",
                    &user,
                    "--gid",
                    &user,
                    "--chroot-base-dir",
                    &base.to_string_lossy(),
                    "--",
                ]
                .map(str::to_owned)
                .to_vec();
                args.append(&mut own);
                (jailer.program.clone(), args)
            }
            _ => (program.to_owned(), own),
        };
        Launch {
            program,
            args,
            env: BTreeMap::new(),
            namespace: parts.namespace.map(Path::to_owned),
            mounts: self.mounts(parts),
            tap_owner: (self.user != 0 && parts.namespace.is_some())
                .then(|| (TAP.to_owned(), self.user)),
            cgroup: parts.cgroup.cloned(),
            user: None,
        }
    }

    fn mounts(&self, parts: &Parts<'_>) -> Vec<Mount> {
        let save_bytes = Self::save_bytes(parts.memory_bytes);
        let tmpfs = |at: PathBuf, bytes, owner| Mount::Tmpfs { at, bytes, owner };
        let Some(root) = &self.jail else {
            let alias = Mount::Bind {
                from: self.dir.clone(),
                at: Path::new("/run").join(ALIAS),
            };
            let mut mounts = vec![alias, tmpfs(self.save_inside.clone(), save_bytes, 0)];
            mounts.extend(parts.disk.map(Mount::disk));
            return mounts;
        };
        let base = root.ancestors().nth(3).unwrap_or(root);
        let at = |inside: &str| root.join(inside.trim_start_matches('/'));
        let bind = |from: &Path, inside: &str| Mount::Bind {
            from: from.to_owned(),
            at: at(inside),
        };
        let mut mounts = vec![
            tmpfs(base.to_owned(), JAIL_BYTES, 0),
            tmpfs(at("/save"), save_bytes, self.user),
            bind(&self.dir, "/run"),
        ];
        let files = [(parts.kernel, "/kernel"), (parts.initrd, "/initrd")];
        mounts.extend(
            files
                .iter()
                .filter_map(|(file, inside)| Some(bind((*file)?, inside))),
        );
        let disk = crate::vmm::launch::DISK_PATH;
        mounts.extend(parts.disk.map(|from| bind(from, disk)));
        mounts
    }
}

/// The API's socket in the VMM's directory.
pub(super) const SOCKET: &str = "api.sock";
/// The socket of whoever serves memory, there.
pub(super) const HANDOFF: &str = "uffd.sock";
/// The device state that is loaded, there.
pub(super) const STATE: &str = "state";
/// A name in `/run` by which every VMM finds its own directory.
pub(super) const ALIAS: &str = "thaw-vmm";
/// The socket that leads to a guest's vsock device: in its device state, so the same for all.
pub(super) const VSOCK_PATH: &str = "/run/thaw-vmm/vsock.sock";

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> Parts<'static> {
        Parts {
            kernel: Some(Path::new("/k/vmlinux")),
            initrd: Some(Path::new("/k/initrd.img")),
            disk: Some(Path::new("/data/disk")),
            namespace: Some(Path::new("/run/netns/x")),
            memory_bytes: 256 << 20,
            cgroup: None,
        }
    }

    fn jailer() -> Jailer {
        Jailer {
            program: "/usr/bin/jailer".into(),
            first_user: 200_000,
        }
    }

    #[test]
    fn a_jailed_vmm_is_a_user_of_its_own_and_finds_its_disk_where_others_do() {
        let (run, program) = (
            Path::new("/run/thaw/sandboxes/a"),
            Path::new("/usr/bin/firecracker"),
        );
        let jailer = jailer();
        let layout = Layout::new(run, 7, program, Some(&jailer));
        let launch = layout.launch(program, Some(&jailer), &parts());
        assert_eq!(launch.program, Path::new("/usr/bin/jailer"));
        let line = launch.args.join(" ");
        assert!(line.contains("--uid 200007 --gid 200007"), "{line}");
        assert!(
            line.contains("--chroot-base-dir /run/thaw/sandboxes/a/jail"),
            "{line}"
        );
        assert!(line.contains("-- --api-sock /run/api.sock"), "{line}");
        assert_eq!(launch.tap_owner, Some(("tap0".to_owned(), 200_007)));
        let root = "/run/thaw/sandboxes/a/jail/firecracker/vm/root";
        let disk = Mount::Bind {
            from: "/data/disk".into(),
            at: format!("{root}/run/thaw-disk").into(),
        };
        assert!(launch.mounts.contains(&disk), "{:?}", launch.mounts);
        // The jail's memory comes before what is shown in it.
        assert!(matches!(&launch.mounts[0], Mount::Tmpfs { owner: 0, .. }));
        assert_eq!(
            layout.saved_by(9, "state"),
            Path::new("/proc/9/root/save/state")
        );
        assert_eq!(layout.kernel(Path::new("/k/vmlinux")), Path::new("/kernel"));
    }

    #[test]
    fn without_a_jailer_paths_are_the_hosts() {
        let (run, program) = (
            Path::new("/run/thaw/sandboxes/a"),
            Path::new("/usr/bin/firecracker"),
        );
        let layout = Layout::new(run, 7, program, None);
        let launch = layout.launch(program, None, &parts());
        assert_eq!(launch.program, program);
        assert!(
            launch
                .mounts
                .contains(&Mount::disk(Path::new("/data/disk")))
        );
        assert_eq!(launch.tap_owner, None);
        assert_eq!(layout.inside(STATE), run.join("vmm/state"));
        let saved = Path::new("/proc/9/root/run/thaw/sandboxes/a/vmm/save/state");
        assert_eq!(layout.saved_by(9, "state"), saved);
    }
}
