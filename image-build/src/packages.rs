//! Debian packages: those that this machine needs are installed, those of the guest only unpacked.
//!
//! The package lists are refreshed at most once, and only when something is missing from them.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::invocation::output;
use crate::progress::step;

/// What this machine needs to make and to boot the inputs.
const NEEDED: [&str; 2] = ["e2fsprogs", "qemu-system-x86"];

/// What the tests need beside that: how to see that it is there, and its package. By what it does,
/// because it need not come from a package. The first two install the clients of others, the third
/// makes a file system whose files can share blocks.
const FOR_TESTS: [(&[&str], &str); 3] = [
    (&["python3", "-m", "ensurepip", "--version"], "python3-venv"),
    (&["npm", "--version"], "npm"),
    (&["mkfs.xfs", "-V"], "xfsprogs"),
];

/// The archive, as far as it has been asked.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    refreshed: Cell<bool>,
}

impl Archive {
    /// Installs what is missing of [`NEEDED`].
    pub(crate) fn install_needed(&self) -> Result<()> {
        self.install(&missing()?)
    }

    /// Installs what is missing of [`FOR_TESTS`].
    pub(crate) fn install_for_tests(&self) -> Result<()> {
        let is_there = |probe: &[&str]| {
            let mut command = Command::new(probe[0]);
            output(command.args(&probe[1..])).is_ok()
        };
        let missing = FOR_TESTS.iter().filter(|(probe, _)| !is_there(probe));
        self.install(&missing.map(|(_, package)| *package).collect::<Vec<_>>())
    }

    fn install(&self, missing: &[&str]) -> Result<()> {
        if missing.is_empty() {
            return Ok(());
        }
        let list = missing.join(" ");
        ensure!(
            is_root()?,
            "These packages are missing and only root can install them. \
             Run: sudo apt-get install --no-install-recommends {list}"
        );
        if missing.iter().any(|package| candidate(package).is_none()) {
            self.refresh()?;
        }
        let mut install = apt_get();
        install
            .args(["install", "-y", "--no-install-recommends"])
            .args(missing);
        let result = step(&format!("installing {list}"), || output(&mut install));
        if result.is_err() && !self.refreshed.get() {
            // Old lists name versions that the archive no longer has.
            self.refresh()?;
            step(&format!("installing {list}"), || output(&mut install))?;
            return Ok(());
        }
        result
            .with_context(|| format!("Installing {list}; try it by hand with apt-get install"))?;
        Ok(())
    }

    /// The package that a meta-package such as `linux-image-cloud-amd64` stands for now.
    pub(crate) fn dependency_of(&self, meta: &str, prefix: &str) -> Result<String> {
        self.ensure_known(meta)?;
        let mut depends = Command::new("apt-cache");
        depends.args(["depends", "--no-recommends", "--no-suggests", meta]);
        let text = output(&mut depends)?;
        let mut names = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "));
        let name = names.find(|name| name.starts_with(prefix));
        let name = name.with_context(|| format!("Package {meta} depends on no {prefix}…"))?;
        Ok(name.to_owned())
    }

    /// Downloads a package and unpacks it into `directory`; gives its version.
    pub(crate) fn unpack(&self, package: &str, directory: &Path) -> Result<String> {
        self.ensure_known(package)?;
        let downloads = directory.join(".download");
        fs::create_dir_all(&downloads)
            .with_context(|| format!("Creating {}", downloads.display()))?;
        let mut download = apt_get();
        // Root's own directory isn't one that apt's download user may write to.
        download.args(["-o", "APT::Sandbox::User=root", "download", package]);
        download.current_dir(&downloads);
        if output(&mut download).is_err() {
            self.refresh()?;
            output(&mut download).with_context(|| {
                format!("Downloading {package}; check the network and /etc/apt/sources.list")
            })?;
        }
        let mut files = fs::read_dir(&downloads)
            .context("Listing the download")?
            .flatten();
        let file = files
            .next()
            .with_context(|| format!("apt-get left no file of {package}"))?;
        output(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(file.path())
                .arg(directory),
        )?;
        let version = output(
            Command::new("dpkg-deb")
                .arg("-f")
                .arg(file.path())
                .arg("Version"),
        )?;
        fs::remove_dir_all(&downloads).context("Removing the download")?;
        Ok(version.trim().to_owned())
    }

    fn ensure_known(&self, package: &str) -> Result<()> {
        if candidate(package).is_none() {
            self.refresh()?;
        }
        if candidate(package).is_none() {
            bail!(
                "The package archive of this system has no {package}: \
                 use Debian 12 or later on amd64, with its main archive in /etc/apt"
            );
        }
        Ok(())
    }

    fn refresh(&self) -> Result<()> {
        if !self.refreshed.replace(true) {
            ensure!(
                is_root()?,
                "The package lists are out of date. Run: sudo apt-get update"
            );
            let mut update = apt_get();
            step("refreshing the package lists", || {
                output(update.arg("update"))
            })
            .context("Refreshing the package lists; check the network and /etc/apt")?;
        }
        Ok(())
    }
}

/// Those of [`NEEDED`] that aren't installed.
fn missing() -> Result<Vec<&'static str>> {
    let mut query = Command::new("dpkg-query");
    query
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\\n"])
        .args(NEEDED);
    // It fails when one is unknown, and still prints the others.
    let printed = query.output().context(
        "There is no dpkg-query here: this needs a Debian system, or qemu-system-x86_64, \
         mkfs.ext4 and a Debian container",
    )?;
    let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
    Ok(not_installed(&printed))
}

fn not_installed(printed: &str) -> Vec<&'static str> {
    let installed = |name: &str| {
        printed
            .lines()
            .any(|line| line == format!("{name} installed"))
    };
    NEEDED.into_iter().filter(|name| !installed(name)).collect()
}

fn candidate(package: &str) -> Option<String> {
    let text = output(Command::new("apt-cache").args(["policy", package])).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (line != "(none)").then(|| line.to_owned())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").arg("-q");
    command
}

fn is_root() -> Result<bool> {
    Ok(output(Command::new("id").arg("-u"))?.trim() == "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_that_are_not_fully_installed_are_missing() {
        assert_eq!(not_installed(""), NEEDED);
        assert_eq!(not_installed("e2fsprogs installed\n"), ["qemu-system-x86"]);
        let removed = "e2fsprogs installed\nqemu-system-x86 config-files\n";
        assert_eq!(not_installed(removed), ["qemu-system-x86"]);
        assert!(not_installed("e2fsprogs installed\nqemu-system-x86 installed\n").is_empty());
    }
}
