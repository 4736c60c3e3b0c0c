//! What a number needs beside it to mean anything: the code and the machine it was measured on.

use std::fmt::{self, Formatter};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

/// The code and the machine.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Host {
    /// The commit, `-dirty` if there were changes; `None` outside a checkout.
    pub(crate) commit: Option<String>,
    /// Debug builds measure the compiler.
    pub(crate) optimised: bool,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) kernel: String,
    pub(crate) architecture: String,
    /// What timestamps come from: with any but `tsc` on x86, a clock reading is a system call.
    pub(crate) clock_source: String,
    /// What the build that is served lies on.
    pub(crate) filesystem: String,
}

impl Host {
    /// Describes this host and the file system of `build`.
    pub(crate) fn describe(build: &Path) -> Result<Self> {
        let uname = nix::sys::utsname::uname().context("Asking for the kernel's version")?;
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        Ok(Self {
            commit: commit(),
            optimised: !cfg!(debug_assertions),
            cpu: cpu_model(&cpuinfo).unwrap_or("unknown").to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: uname.release().to_string_lossy().into_owned(),
            architecture: uname.machine().to_string_lossy().into_owned(),
            clock_source: std::fs::read_to_string(clock)
                .map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned()),
            filesystem: filesystem(build).unwrap_or_else(|| "unknown".to_owned()),
        })
    }
}

impl Host {
    /// The first lines of every report.
    pub(crate) fn head(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let commit = self.commit.as_deref().unwrap_or("unknown");
        writeln!(f, "  commit   {commit}")?;
        writeln!(
            f,
            "  host     {}, {} CPUs, Linux {} {}, clock {}",
            self.cpu, self.cpus, self.kernel, self.architecture, self.clock_source
        )?;
        writeln!(f, "  build    on {}", self.filesystem)
    }
}

fn commit() -> Option<String> {
    let output = Command::new("git")
        .args([
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
            "--exclude=*",
        ])
        .output()
        .ok()?;
    let commit = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !commit.is_empty()).then_some(commit)
}

fn cpu_model(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo
        .lines()
        .find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim())
}

fn filesystem(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    filesystem_in(&mounts, &path).map(str::to_owned)
}

/// The type of the deepest mount that contains a path.
fn filesystem_in<'a>(mountinfo: &'a str, path: &Path) -> Option<&'a str> {
    // 36 35 98:0 /root /mount/point options [optional fields] - type source options
    let mounts = mountinfo.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        Some((before.split(' ').nth(4)?, after.split(' ').next()?))
    });
    mounts
        .filter(|(point, _)| path.starts_with(point))
        .max_by_key(|(point, _)| point.len())
        .map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_names_the_file_system() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
                      2 1 0:5 / /data rw shared:1 - xfs /dev/sdb rw\n\
                      3 1 0:6 / /database rw - tmpfs none rw\n";
        let of = |path: &str| filesystem_in(mounts, Path::new(path));
        assert_eq!(of("/data/builds"), Some("xfs"));
        assert_eq!(of("/database"), Some("tmpfs"));
        assert_eq!(of("/datafile"), Some("ext4"));
    }

    #[test]
    fn a_host_without_a_model_name_has_none() {
        assert_eq!(
            cpu_model("processor : 0\nmodel name\t: A CPU\n"),
            Some("A CPU")
        );
        assert_eq!(cpu_model("processor : 0\n"), None);
    }
}
