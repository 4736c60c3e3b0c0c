//! What a trial must not leave: processes, sockets, namespaces, links, mounts, devices, files.

use std::fs;
use std::path::Path;

use super::daemon::{INSTANCE, Workplace};
use crate::network::nftables;
use crate::sys::device_mapper::DeviceMapper;
use crate::sys::loop_device;

/// Everything that is left over, described.
pub(super) fn find(workplace: &Workplace) -> Vec<String> {
    let mut found = Vec::new();
    processes(&workplace.run, &mut found);
    for (what, dir) in [
        ("socket", workplace.run.clone()),
        ("sandbox directory", workplace.run.join("sandboxes")),
        ("sandbox directory", workplace.data.join("sandboxes")),
        ("build", workplace.data.join("builds")),
    ] {
        for name in names(&dir) {
            if name != "sandboxes" {
                found.push(format!("{what} {}", dir.join(name).display()));
            }
        }
    }
    for (what, dir) in [("namespace", "/run/netns"), ("link", "/sys/class/net")] {
        for name in names(Path::new(dir)) {
            if name.starts_with(INSTANCE) {
                found.push(format!("{what} {name}"));
            }
        }
    }
    let tables = nftables::tables().unwrap_or_default();
    let ours = tables
        .iter()
        .filter(|table| table.ends_with(&format!("-{INSTANCE}")));
    found.extend(ours.map(|table| format!("nftables table {table}")));
    let loops = loop_device::below(&workplace.data).unwrap_or_default();
    found.extend(
        loops
            .iter()
            .map(|device| format!("loop device {}", device.path().display())),
    );
    let devices = DeviceMapper::open().and_then(|mapper| mapper.names());
    let prefix = format!("thaw-{INSTANCE}-");
    let ours = devices.unwrap_or_default().into_iter();
    let ours = ours.filter(|name| name.starts_with(&prefix));
    found.extend(ours.map(|name| format!("device {name}")));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let ours = |line: &&str| {
        line.contains(&*workplace.data.to_string_lossy()) || line.contains(&format!("/{INSTANCE}"))
    };
    found.extend(
        mounts
            .lines()
            .filter(ours)
            .map(|line| format!("mount {line}")),
    );
    found
}

/// VMMs name their control socket in the trial's run directory; engines are our program.
fn processes(run: &Path, found: &mut Vec<String>) {
    let own = fs::read_link("/proc/self/exe").unwrap_or_default();
    for name in names(Path::new("/proc")) {
        let Ok(pid) = name.parse::<u32>() else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let of_ours =
            program == own && (command.contains(" engine ") || command.contains(" launch"));
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let needle = run.to_string_lossy();
        let vmm = String::from_utf8_lossy(&environment).contains(&*needle)
            || command.contains("-name thaw-") && command.contains(super::scenario::PREFIX);
        if of_ours || vmm {
            found.push(format!("process {pid} {}", command.trim()));
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Whether a VMM of this sandbox runs.
pub(super) fn vmm_runs(id: &str) -> bool {
    names(Path::new("/proc"))
        .iter()
        .filter(|name| name.parse::<u32>().is_ok())
        .any(|pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let wanted = format!("-name\0thaw-{id}\0");
            command
                .windows(wanted.len())
                .any(|window| window == wanted.as_bytes())
        })
}
