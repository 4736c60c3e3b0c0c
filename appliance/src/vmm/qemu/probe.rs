//! Which QEMU, and does KVM run guests here?
//!
//! `/dev/kvm` may be there, answer every ioctl, run a few instructions, and still never
//! bring a stock kernel up (nested and paravirtual KVMs do this). So the question is put
//! the only way that counts: the kernel that guests will use is started on KVM, and has to
//! get to the point where it finds that it has no root. It panics there, and QEMU ends.
//! The answer is kept for as long as neither the host's boot, nor QEMU, nor that kernel
//! changes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use http_api::wire::VmmInfo;
use thiserror::Error;
use tokio::process::Command;
use tokio::time::timeout;

use super::Qemu;
use super::command::{self, Accelerator};
use crate::config::AcceleratorChoice;
use crate::vmm::own_user::{self, OwnUser, Users};
use crate::vmm::probing::{Finding, KERNEL_TIME, MISSES_ITS_ROOT, cache_key};

/// Why QEMU can't be used.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// The program doesn't run.
    #[error("Running {} --version: install QEMU (Debian: apt-get install qemu-system-x86) or set vmm.qemu", program.display())]
    NoQemu {
        /// As configured.
        program: PathBuf,
        /// Why it doesn't.
        #[source]
        source: io::Error,
    },
    /// The preload library isn't there.
    #[error("The preload library {} is not there: build it (cargo build --release -p uffd-preload) or set vmm.preload", path.display())]
    NoPreload {
        /// As configured.
        path: PathBuf,
    },
    /// The configuration insists on KVM.
    #[error("vmm.accelerator is \"kvm\", but {reason}")]
    NoKvm {
        /// What the probe found.
        reason: String,
    },
}

/// Finds QEMU and decides what executes the guests. Where KVM is insisted on, the probe guest has
/// as long as a guest may take to its first answer, `boot_time`.
///
/// # Errors
/// What is missing and what to do about it.
pub async fn probe(
    program: &Path,
    preload: &Path,
    choice: AcceleratorChoice,
    kernel: &Path,
    cache: &Path,
    boot_time: Duration,
) -> Result<Qemu, ProbeError> {
    let version = version(program).await?;
    if !preload.is_file() {
        return Err(ProbeError::NoPreload {
            path: preload.to_owned(),
        });
    }
    let (accelerator, reason) = match choice {
        AcceleratorChoice::Tcg => (Accelerator::Tcg, "emulation was configured".to_owned()),
        AcceleratorChoice::Auto | AcceleratorChoice::Kvm => {
            let insists = choice == AcceleratorChoice::Kvm;
            let limit = if insists { boot_time } else { KERNEL_TIME };
            let finding = kvm_runs_guests(program, &version, kernel, cache, limit).await;
            match (finding.runs, choice) {
                (true, _) => (Accelerator::Kvm, finding.reason),
                (false, AcceleratorChoice::Kvm) => {
                    return Err(ProbeError::NoKvm {
                        reason: finding.reason,
                    });
                }
                (false, _) => (
                    Accelerator::Tcg,
                    format!("emulation, because {}", finding.reason),
                ),
            }
        }
    };
    let info = VmmInfo {
        name: "qemu".into(),
        version,
        accelerator: accelerator.name().into(),
        reason,
    };
    Ok(Qemu {
        program: program.to_owned(),
        preload: preload.to_owned(),
        accelerator,
        state_format: super::state_format(&info.version),
        users: None,
        info,
    })
}

/// Whether this QEMU starts as a user of its own, who can load the preload library and open a
/// userfaultfd.
///
/// # Errors
/// At what it fails.
pub async fn try_users(qemu: &Qemu, users: Users) -> io::Result<()> {
    if let Some(path) = own_user::unreadable([qemu.preload.as_path()]) {
        let problem = format!("{} can't be read by others", path.display());
        return Err(io::Error::other(problem));
    }
    let user = OwnUser {
        faults: true,
        ..command::own_user(qemu.accelerator, users.of(0))
    };
    own_user::try_out(&qemu.program, user).await
}

async fn version(program: &Path) -> Result<String, ProbeError> {
    let failed = |source| ProbeError::NoQemu {
        program: program.to_owned(),
        source,
    };
    let output = Command::new(program)
        .arg("--version")
        .output()
        .await
        .map_err(failed)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .lines()
        .next()
        .and_then(|line| line.split("version ").nth(1));
    let version = version.and_then(|rest| rest.split_whitespace().next());
    version
        .map(str::to_owned)
        .ok_or_else(|| failed(io::Error::other("it printed no version")))
}

async fn kvm_runs_guests(
    program: &Path,
    version: &str,
    kernel: &Path,
    cache: &Path,
    limit: Duration,
) -> Finding {
    let key = format!("{} {limit:?}", cache_key(version, kernel));
    if let Some(finding) = Finding::cached(cache, &key) {
        return finding;
    }
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        let reason = format!("/dev/kvm can't be used ({error})");
        return Finding {
            key,
            runs: false,
            reason,
        };
    }
    tracing::info!(
        seconds_at_most = limit.as_secs(),
        "Starting a guest on KVM to see whether it runs"
    );
    let started = Instant::now();
    let (runs, reason) = match run_guest(program, kernel, limit).await {
        Ok(true) => (
            true,
            format!("a probe guest ran on KVM in {:.1?}", started.elapsed()),
        ),
        Ok(false) => {
            let seconds = limit.as_secs();
            (
                false,
                format!("/dev/kvm is there but a probe guest did not get up in {seconds} s"),
            )
        }
        Err(error) => (
            false,
            format!("a probe guest could not be started on KVM ({error})"),
        ),
    };
    let finding = Finding { key, runs, reason };
    finding.keep(cache);
    finding
}

/// Whether the kernel got as far as missing its root.
async fn run_guest(program: &Path, kernel: &Path, limit: Duration) -> io::Result<bool> {
    let mut command = Command::new(program);
    command
        .args([
            "-accel", "kvm", "-cpu", "host", "-M", "pc", "-m", "256", "-smp", "1",
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-serial", "stdio"])
        .arg("-kernel")
        .arg(kernel)
        // A panic is printed all the same, and every other character costs an exit or more.
        .args(["-append", "console=ttyS0 panic=-1 quiet"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let child = command.spawn()?;
    match timeout(limit, child.wait_with_output()).await {
        Err(_) => Ok(false),
        Ok(output) => {
            let output = output?;
            if String::from_utf8_lossy(&output.stdout).contains(MISSES_ITS_ROOT) {
                return Ok(true);
            }
            let error = String::from_utf8_lossy(&output.stderr);
            Err(io::Error::other(
                error.lines().last().unwrap_or("it ended early").to_owned(),
            ))
        }
    }
}
