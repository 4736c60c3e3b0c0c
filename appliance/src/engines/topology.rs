//! The host's NUMA nodes and their CPUs, as `/sys` tells them.

use std::fs;
use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use uffd_engine::Waiting;
use uffd_engine::calibration::Calibration;

use crate::config::EngineConfig;

/// One NUMA node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub number: u32,
    /// Its CPUs that this process may use.
    pub cpus: Vec<usize>,
}

impl Node {
    /// The CPUs as an argument: `0,1,4`.
    #[must_use]
    pub fn cpu_list(&self) -> String {
        let cpus: Vec<String> = self.cpus.iter().map(ToString::to_string).collect();
        cpus.join(",")
    }
}

/// All nodes with a usable CPU; a host that tells of none is one node.
#[must_use]
pub fn nodes() -> Vec<Node> {
    let allowed = allowed_cpus();
    let mut nodes = Vec::new();
    let root = Path::new("/sys/devices/system/node");
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix("node")?.parse().ok());
        let list = fs::read_to_string(entry.path().join("cpulist"));
        if let (Some(number), Ok(list)) = (number, list) {
            let mut cpus = parse_list(&list);
            cpus.retain(|cpu| allowed.contains(cpu));
            if !cpus.is_empty() {
                nodes.push(Node { number, cpus });
            }
        }
    }
    nodes.sort_by_key(|node| node.number);
    if nodes.is_empty() {
        nodes.push(Node {
            number: 0,
            cpus: allowed,
        });
    }
    nodes
}

/// How workers are to wait, where the configuration doesn't say: measured on the first node. With
/// it, what was found.
pub fn calibrate(run_dir: &Path, config: &mut EngineConfig) -> String {
    if let Some(us) = config.spin_us {
        return format!("{}, as configured", waits(Waiting::spinning(us)));
    }
    config.spin_us = Some(0);
    let nodes = nodes();
    let cpus = nodes.first().map_or(&[] as &[usize], |node| &node.cpus);
    let found = match Calibration::measure(cpus, run_dir) {
        Ok(found) => found,
        Err(error) => return format!("block, because measuring failed: {error}"),
    };
    let waiting = found.waiting();
    if let Waiting::Spin { us } = waiting {
        config.spin_us = Some(us);
    }
    let beside = if found.same_core_pays() && !config.pin_vcpus {
        "; engine.pin_vcpus would put vCPUs beside their workers"
    } else {
        ""
    };
    format!(
        "{}, by measurement of a fault: {found}{beside}",
        waits(waiting)
    )
}

fn waits(waiting: Waiting) -> String {
    match waiting {
        Waiting::Block => "block".to_owned(),
        Waiting::Spin { us } => format!("spin for {us} µs"),
    }
}

fn allowed_cpus() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_else(|_| CpuSet::new());
    (0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect()
}

/// `0-3,8,10-11`, the kernel's way to write a set.
#[must_use]
pub fn parse_list(text: &str) -> Vec<usize> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) {
            cpus.extend(first..=last);
        }
    }
    cpus
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lists_are_understood() {
        assert_eq!(parse_list("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(parse_list("\n"), Vec::<usize>::new());
    }
}
