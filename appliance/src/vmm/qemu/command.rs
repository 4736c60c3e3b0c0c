//! QEMU's command line, as a value.
//!
//! The same arguments boot and restore a guest, but for `-incoming`: QEMU refuses a device
//! state of a machine that was put together differently.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::HANDOFF;
use serde_json::{Value, json};

use crate::network::address::{GATEWAY, GUEST, GUEST_MAC, GUEST_PREFIX, TAP};
use crate::vmm::launch::{
    DIR_PATH, DISK_PATH, INITRD_PATH, KERNEL_PATH, Launch, Mount, descriptor,
};
use crate::vmm::own_user::{KVM, OwnUser, TUN, USERFAULTFD};
use crate::vmm::{DiskLimits, GuestShape, Place};

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The hardware.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

impl Accelerator {
    /// As QEMU calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    const fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

/// Where it finds the preload library.
const PRELOAD_PATH: &str = "/run/thaw-preload.so";

/// What it calls the disk.
const DISK: &str = "disk";

/// Which descriptor of the launch is the RAM file.
pub const RAM_FD: usize = 0;
/// Which is the listening control socket.
pub const QMP_FD: usize = 1;

/// How a guest's memory and devices start.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// From the kernel.
    Boot,
    /// From a device state that comes over QMP, with memory handed over to an engine.
    Restore {
        /// The preload library.
        preload: &'a Path,
        /// `device:inode` of the RAM file.
        ram_inode: &'a str,
    },
}

/// The same launch, with limits on its disk.
#[must_use]
pub fn with_disk_limits(mut launch: Launch, limits: DiskLimits) -> Launch {
    let drive = launch.args.iter_mut();
    let drive = drive.filter(|argument| argument.contains(DISK_PATH));
    for argument in drive {
        for (name, limit) in [
            ("bps-total", limits.bytes_per_s),
            ("iops-total", limits.ops_per_s),
        ] {
            if let Some(limit) = limit {
                argument.push_str(&format!(",throttling.{name}={limit}"));
            }
        }
    }
    launch
}

/// The same launch, by a user of its own.
#[must_use]
pub fn as_user(mut launch: Launch, accelerator: Accelerator, user: Option<u32>) -> Launch {
    launch.user = user.map(|id| own_user(accelerator, id));
    launch.tap_owner = user.map(|user| (TAP.to_owned(), user));
    launch
}

/// Who a QEMU is.
pub(super) fn own_user(accelerator: Accelerator, id: u32) -> OwnUser {
    let kvm = (accelerator == Accelerator::Kvm).then_some(KVM);
    let devices = [TUN, USERFAULTFD].into_iter().chain(kvm);
    OwnUser {
        id,
        devices: devices.map(PathBuf::from).collect(),
        faults: false,
    }
}

/// What QEMU is told to change the limits of a disk to; none is 0 there.
#[must_use]
pub fn throttle(limits: DiskLimits) -> Value {
    json!({
        "device": DISK,
        "bps": limits.bytes_per_s.unwrap_or(0), "bps_rd": 0, "bps_wr": 0,
        "iops": limits.ops_per_s.unwrap_or(0), "iops_rd": 0, "iops_wr": 0,
    })
}

/// The device by which a guest says which memory it has freed, in blocks of megabytes. QEMU punches
/// them out of the RAM file, and then drops its mapping of them: the event by which an engine hears
/// of it, and on which all of QEMU but the vCPUs waits. A guest that expects to find anything but
/// zeros there says so, and QEMU leaves its memory alone.
///
/// Huge pages are kept: their mapping holds a right to each, and a hole gives that back with the
/// page. The host's pool may be empty when the guest touches it again, which ends its VMM, however
/// many pages it was promised.
///
/// Source: `virtio_balloon_handle_report` in `hw/virtio/virtio-balloon.c` and
/// `ram_block_discard_range` in `softmmu/physmem.c` of QEMU 7.2; `hugetlb_unreserve_pages` in
/// `mm/hugetlb.c` of the kernel.
fn balloon(shape: &GuestShape) -> String {
    let reports = if shape.huge_pages { "off" } else { "on" };
    format!("virtio-balloon-pci,deflate-on-oom=on,free-page-reporting={reports}")
}

/// The launch of one QEMU.
#[must_use]
pub fn launch(
    program: &Path,
    accelerator: Accelerator,
    shape: &GuestShape,
    place: &Place,
    start: Start<'_>,
) -> Launch {
    let memory = shape.memory_mb;
    let mut args: Vec<String> = Vec::new();
    let mut add = |parts: &[&str]| args.extend(parts.iter().map(|part| (*part).to_owned()));
    add(&["-name", &format!("thaw-{}", place.name)]);
    add(&accelerator.arguments());
    add(&["-M", "pc,memory-backend=ram"]);
    add(&["-m", &memory.to_string(), "-smp", &shape.vcpus.to_string()]);
    let ram = descriptor(RAM_FD);
    add(&[
        "-object",
        &format!("memory-backend-file,id=ram,size={memory}M,mem-path=/proc/self/fd/{ram},share=on"),
    ]);
    add(&[
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    // QEMU's own seccomp filter: it starts no program and gains no privilege.
    add(&[
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]);
    add(&["-serial", "stdio"]);
    let qmp = descriptor(QMP_FD);
    add(&[
        "-chardev",
        &format!("socket,id=qmp,fd={qmp},server=on,wait=off"),
    ]);
    add(&["-mon", "chardev=qmp,mode=control"]);
    add(&["-kernel", KERNEL_PATH, "-initrd", INITRD_PATH]);
    // A kernel that knows no hypervisor counts ticks of the timer for a moment and panics when
    // there are too few, which on a busy host there may be. Under KVM it does not look.
    let fixed = "console=ttyS0 panic=-1 no_timer_check";
    let network = format!("thaw.ip={GUEST}/{GUEST_PREFIX} thaw.gw={GATEWAY}");
    add(&["-append", &format!("{fixed} {network} {}", shape.cmdline)]);
    add(&[
        "-drive",
        &format!("if=none,id={DISK},file={DISK_PATH},format=raw,cache=writeback,aio=threads"),
    ]);
    add(&[
        "-device",
        "virtio-blk-pci,drive=disk,werror=report,rerror=report",
    ]);
    add(&[
        "-netdev",
        &format!("tap,id=net,ifname={TAP},script=no,downscript=no"),
    ]);
    add(&[
        "-device",
        &format!("virtio-net-pci,romfile=,netdev=net,mac={GUEST_MAC}"),
    ]);
    add(&["-device", &balloon(shape)]);
    let mut env = BTreeMap::new();
    let mut mounts = vec![
        Mount::at(DIR_PATH, &super::dir(place)),
        Mount::at(KERNEL_PATH, &shape.kernel),
        Mount::at(INITRD_PATH, &shape.initrd),
        Mount::disk(&place.disk),
    ];
    if let Start::Restore { preload, ram_inode } = start {
        mounts.push(Mount::at(PRELOAD_PATH, preload));
        add(&["-incoming", "defer"]);
        env.insert("LD_PRELOAD".to_owned(), PRELOAD_PATH.to_owned());
        let handoff = format!("{DIR_PATH}/{HANDOFF}");
        env.insert("THAW_UFFD_SOCKET".to_owned(), handoff);
        env.insert("THAW_RAM_INODE".to_owned(), ram_inode.to_owned());
    }
    Launch {
        program: program.to_owned(),
        args,
        env,
        namespace: Some(place.namespace.clone()),
        mounts,
        tap_owner: None,
        cgroup: place.cgroup.clone(),
        user: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> GuestShape {
        GuestShape {
            vcpus: 2,
            memory_mb: 256,
            huge_pages: false,
            kernel: "/k".into(),
            initrd: "/i".into(),
            cmdline: "quiet".into(),
        }
    }

    fn place() -> Place {
        Place {
            name: "s1".into(),
            template: "base".into(),
            slot: 1,
            run_dir: "/run/x".into(),
            namespace: "/run/netns/x".into(),
            disk: "/data/disk".into(),
            disk_limits: DiskLimits::default(),
            cgroup: None,
        }
    }

    #[test]
    fn a_restore_differs_from_a_boot_only_where_qemu_allows() {
        let program = Path::new("qemu");
        let boot = launch(program, Accelerator::Tcg, &shape(), &place(), Start::Boot);
        let start = Start::Restore {
            preload: Path::new("/p.so"),
            ram_inode: "1:2",
        };
        let restore = launch(program, Accelerator::Tcg, &shape(), &place(), start);
        assert!(boot.env.is_empty());
        assert_eq!(restore.args[..boot.args.len()], boot.args[..]);
        assert_eq!(restore.args[boot.args.len()..], ["-incoming", "defer"]);
    }

    #[test]
    fn a_user_of_its_own_has_its_tap_device_and_no_more_devices_than_it_needs() {
        let start = Start::Boot;
        let of = |accelerator, user| {
            let launch = launch(Path::new("q"), accelerator, &shape(), &place(), start);
            as_user(launch, accelerator, user)
        };
        let emulated = of(Accelerator::Tcg, Some(9));
        assert_eq!(emulated.tap_owner, Some((TAP.to_owned(), 9)));
        let devices = |launch: &Launch| launch.user.as_ref().unwrap().devices.clone();
        assert_eq!(devices(&emulated), [TUN, USERFAULTFD].map(PathBuf::from));
        let on_kvm = of(Accelerator::Kvm, Some(9));
        assert!(devices(&on_kvm).contains(&PathBuf::from(KVM)));
        let daemons = of(Accelerator::Kvm, None);
        assert_eq!((&daemons.user, &daemons.tap_owner), (&None, &None));
        // Nothing that it is told leads through a directory that it can't enter.
        let inside = ["/run/thaw-kernel", "/run/thaw-initrd"];
        assert!(
            inside
                .iter()
                .all(|path| daemons.args.iter().any(|arg| arg == path))
        );
    }

    #[test]
    fn limits_are_those_of_the_disk() {
        let start = || {
            launch(
                Path::new("q"),
                Accelerator::Kvm,
                &shape(),
                &place(),
                Start::Boot,
            )
        };
        let limits = DiskLimits {
            bytes_per_s: Some(4096),
            ops_per_s: Some(7),
        };
        let line = with_disk_limits(start(), limits).args.join(" ");
        assert!(
            line.contains("aio=threads,throttling.bps-total=4096,throttling.iops-total=7 "),
            "{line}"
        );
        let later = throttle(limits);
        assert_eq!((&later["bps"], &later["iops"]), (&json!(4096), &json!(7)));
        assert_eq!(throttle(DiskLimits::default())["bps"], 0);
        let unlimited = with_disk_limits(start(), DiskLimits::default());
        assert_eq!(unlimited.args, start().args);
    }

    #[test]
    fn what_a_guest_frees_is_reported_unless_its_pages_are_huge() {
        let line = |huge_pages| {
            let shape = GuestShape {
                huge_pages,
                ..shape()
            };
            let qemu = Path::new("q");
            launch(qemu, Accelerator::Tcg, &shape, &place(), Start::Boot).args
        };
        let small = line(false);
        let device = "virtio-balloon-pci,deflate-on-oom=on,free-page-reporting=on";
        // Behind the others, which stay at the addresses that they have without it.
        assert_eq!(small[small.len() - 2..], ["-device", device]);
        let huge = line(true).join(" ");
        assert!(huge.contains("virtio-balloon-pci"), "{huge}");
        assert!(huge.ends_with("free-page-reporting=off"), "{huge}");
    }

    #[test]
    fn clones_see_their_disk_under_one_path() {
        let a = launch(
            Path::new("q"),
            Accelerator::Kvm,
            &shape(),
            &place(),
            Start::Boot,
        );
        let other = Place {
            disk: "/data/other".into(),
            ..place()
        };
        let b = launch(
            Path::new("q"),
            Accelerator::Kvm,
            &shape(),
            &other,
            Start::Boot,
        );
        assert_eq!(a.args, b.args);
        assert_ne!(a.mounts, b.mounts);
    }
}
