//! What this host has, as its kernel tells it. Whatever can't be read is left empty: a scheduler
//! sees the rest.

use std::fs;
use std::path::Path;

use http_api::wire::{Capacity, CpuInfo, Hugepages, NumaNode};

use crate::engines::topology;

/// The processors. Source: proc_cpuinfo(5).
#[must_use]
pub fn cpu() -> CpuInfo {
    cpu_in(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn cpu_in(text: &str) -> CpuInfo {
    let field = |name: &str| {
        text.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            (found.trim() == name).then(|| value.trim().to_owned())
        })
    };
    let threads = text.lines().filter(|line| line.starts_with("processor"));
    let flags = field("flags").unwrap_or_default();
    let mut flags: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
    flags.sort_unstable();
    CpuInfo {
        model: field("model name").unwrap_or_default(),
        threads: u32::try_from(threads.count()).unwrap_or(u32::MAX),
        flags,
    }
}

/// The NUMA nodes with a usable CPU.
#[must_use]
pub fn nodes() -> Vec<NumaNode> {
    let nodes = topology::nodes().into_iter();
    nodes
        .map(|node| NumaNode {
            node: node.number,
            cpus: node.cpus,
        })
        .collect()
}

/// The kernel's release.
#[must_use]
pub fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

/// Huge pages by size. Source: hugetlbpage.rst of the kernel.
#[must_use]
pub fn hugepages() -> Vec<Hugepages> {
    let mut found = Vec::new();
    let root = Path::new("/sys/kernel/mm/hugepages");
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let size = name.strip_prefix("hugepages-");
        let size = size.and_then(|size| size.strip_suffix("kB")?.parse().ok());
        let number = |file: &str| {
            let text = fs::read_to_string(entry.path().join(file)).ok()?;
            text.trim().parse().ok()
        };
        if let (Some(page_kib), Some(total), Some(free)) =
            (size, number("nr_hugepages"), number("free_hugepages"))
        {
            found.push(Hugepages {
                page_kib,
                total,
                free,
            });
        }
    }
    found.sort_by_key(|pages| pages.page_kib);
    found
}

/// Memory of the host, and room where `dir` is; what sandboxes take is the caller's to say.
#[must_use]
pub fn room(dir: &Path) -> Capacity {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mut capacity = Capacity {
        memory_total_mb: mib_in(&memory, "MemTotal"),
        memory_available_mb: mib_in(&memory, "MemAvailable"),
        ..Capacity::default()
    };
    if let Ok(disk) = nix::sys::statvfs::statvfs(dir) {
        let mib = |blocks: u64| (blocks * disk.fragment_size()) >> 20;
        capacity.disk_total_mb = mib(disk.blocks());
        capacity.disk_available_mb = mib(disk.blocks_available());
    }
    capacity
}

/// A line of meminfo, `Name:   12345 kB`, in MiB.
fn mib_in(text: &str, name: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) >> 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_and_named() {
        let text = "processor\t: 0\nmodel name\t: Some CPU: fast\nflags\t\t: vmx sse fpu\n\n\
                    processor\t: 1\nmodel name\t: Some CPU: fast\nflags\t\t: vmx sse fpu\n";
        let cpu = cpu_in(text);
        assert_eq!((cpu.threads, &*cpu.model), (2, "Some CPU: fast"));
        assert_eq!(cpu.flags, ["fpu", "sse", "vmx"]);
        assert_eq!(cpu_in(""), CpuInfo::default());
    }

    #[test]
    fn memory_is_in_mib() {
        let text = "MemTotal:        4194304 kB\nMemAvailable:    2097152 kB\n";
        assert_eq!(mib_in(text, "MemTotal"), 4096);
        assert_eq!(mib_in(text, "MemAvailable"), 2048);
        assert_eq!(mib_in(text, "Mem"), 0);
    }
}
