//! What every driver asks of a VMM at start in the same way: its version, and whether the kernel
//! that guests will use gets up in it.
//!
//! Nested and paravirtual KVMs run a guest of a few instructions and no stock kernel, so the
//! kernel is started; that answer is kept for as long as neither the host's boot, nor the VMM, nor
//! the kernel changes.

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use http_api::wire::VmmInfo;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::process::Command;
use tokio::time::timeout;

use super::console::Console;
use super::{GuestShape, VmmError};
use crate::host::remove_dir;

/// A kernel reaches its end in well under a second on hardware; this is for slow hosts.
pub(super) const KERNEL_TIME: Duration = Duration::from_secs(10);
/// What a kernel says that got up and has no root.
pub(super) const MISSES_ITS_ROOT: &str = "Kernel panic - not syncing";

/// Why a VMM can't be used.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// The program doesn't run.
    #[error("Running {} {argument}", program.display())]
    Program {
        /// As configured.
        program: PathBuf,
        /// What it was asked.
        argument: &'static str,
        /// Why it doesn't.
        #[source]
        source: io::Error,
    },
    /// It is too old.
    #[error("{} is version {version}; {}.{} or later is needed", program.display(), oldest.0, oldest.1)]
    Old {
        /// As configured.
        program: PathBuf,
        /// What it says.
        version: String,
        /// The oldest that has all we use.
        oldest: (u32, u32),
    },
    /// A file for the probe can't be written.
    #[error("Writing {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No guest runs.
    #[error("A guest of a few instructions does not run in {}", program.display())]
    Guest {
        /// As configured.
        program: PathBuf,
        /// What failed.
        #[source]
        source: VmmError,
    },
    /// The kernel does not get up.
    #[error("{reason}")]
    Kernel {
        /// What was seen.
        reason: String,
    },
}

impl ProbeError {
    /// What it is when no guest runs in this program.
    pub(super) fn guest(program: &Path) -> impl Fn(VmmError) -> Self + use<> {
        let program = program.to_owned();
        move |source| Self::Guest {
            program: program.clone(),
            source,
        }
    }
}

/// The version that a program prints, without the `v` before it.
pub(super) async fn version_of(
    program: &Path,
    argument: &'static str,
) -> Result<String, ProbeError> {
    let failed = |source| ProbeError::Program {
        program: program.to_owned(),
        argument,
        source,
    };
    let output = Command::new(program).arg(argument).output();
    let output = output.await.map_err(failed)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = |word: &str| {
        let word = word.strip_prefix('v')?;
        word.starts_with(|c: char| c.is_ascii_digit())
            .then(|| word.to_owned())
    };
    text.split_whitespace()
        .find_map(version)
        .ok_or_else(|| failed(io::Error::other("it printed no version")))
}

/// The first two numbers of a version that is not too old.
pub(super) fn new_enough(
    program: &Path,
    version: &str,
    oldest: (u32, u32),
) -> Result<(u32, u32), ProbeError> {
    let number = number_of(version).filter(|number| *number >= oldest);
    number.ok_or_else(|| ProbeError::Old {
        program: program.to_owned(),
        version: version.to_owned(),
        oldest,
    })
}

/// Writes a file for a probe, in a directory that is made if need be.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), ProbeError> {
    fs::create_dir_all(path.parent().unwrap_or(path))
        .and_then(|()| fs::write(path, bytes))
        .map_err(|source| ProbeError::File {
            path: path.to_owned(),
            source,
        })
}

/// What guests of probes are.
pub(super) fn shape(kernel: &Path, memory_mb: u32) -> GuestShape {
    GuestShape {
        vcpus: 1,
        memory_mb,
        huge_pages: false,
        kernel: kernel.to_owned(),
        initrd: PathBuf::new(),
        cmdline: String::new(),
    }
}

/// What a start of a stock kernel found, and for what.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Finding {
    pub(super) key: String,
    pub(super) runs: bool,
    pub(super) reason: String,
}

impl Finding {
    /// What was found before with the same things.
    pub(super) fn cached(cache: &Path, key: &str) -> Option<Self> {
        let finding: Self = serde_json::from_slice(&fs::read(cache).ok()?).ok()?;
        (finding.key == key).then_some(finding)
    }

    /// Keeps it; whoever can't will look again.
    pub(super) fn keep(&self, cache: &Path) {
        if let Ok(bytes) = serde_json::to_vec(self) {
            let _ = fs::write(cache, bytes);
        }
    }
}

/// Waits until a guest has said something.
pub(super) async fn says(
    name: &str,
    console: &Console,
    words: &str,
    patience: Duration,
) -> Result<(), VmmError> {
    if timeout(patience, console.wait_for(words)).await == Ok(true) {
        return Ok(());
    }
    Err(VmmError::Timeout {
        name: name.to_owned(),
        command: format!(
            "printing {words:?} (its console ends with: {})",
            console.tail()
        ),
        seconds: patience.as_secs(),
    })
}

/// As [`whether_a_kernel_runs`]; nothing is left in the directory that it is booted in.
pub(super) async fn try_kernel(
    vmm: &VmmInfo,
    kernel: &Path,
    cache: &Path,
    run_dir: &Path,
    booting: impl Future<Output = Result<(), VmmError>>,
) -> Result<String, ProbeError> {
    let booting = async {
        let booted = booting.await;
        remove_dir(run_dir);
        booted
    };
    whether_a_kernel_runs(vmm, kernel, cache, booting)
        .await
        .map_err(|reason| ProbeError::Kernel { reason })
}

/// Whether a kernel gets up, from `cache` or by `booting` it; why it was found so.
async fn whether_a_kernel_runs(
    vmm: &VmmInfo,
    kernel: &Path,
    cache: &Path,
    booting: impl Future<Output = Result<(), VmmError>>,
) -> Result<String, String> {
    let key = cache_key(&vmm.version, kernel);
    let finding = match Finding::cached(cache, &key) {
        Some(finding) => finding,
        None => {
            tracing::info!(
                vmm = vmm.name,
                seconds_at_most = KERNEL_TIME.as_secs(),
                "Starting the guests' kernel to see whether it gets up"
            );
            let finding = find(key, booting).await;
            finding.keep(cache);
            finding
        }
    };
    if finding.runs {
        Ok(finding.reason)
    } else {
        Err(finding.reason)
    }
}

async fn find(key: String, booting: impl Future<Output = Result<(), VmmError>>) -> Finding {
    let started = Instant::now();
    match booting.await {
        Ok(()) => Finding {
            key,
            runs: true,
            reason: format!("the guests' kernel got up in {:.1?}", started.elapsed()),
        },
        Err(error) => {
            let error = uffd_engine::chain(&error);
            Finding {
                key,
                runs: false,
                reason: format!("the guests' kernel does not get up: {error}"),
            }
        }
    }
}

/// The first two numbers of a version.
pub(super) fn number_of(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// What a start of a kernel depends on: the host's boot, the VMM and the kernel.
pub(super) fn cache_key(version: &str, kernel: &Path) -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let file = fs::metadata(kernel)
        .map(|m| (m.len(), m.mtime()))
        .unwrap_or_default();
    format!("{} {version} {} {file:?}", boot.trim(), kernel.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_has_two_numbers() {
        assert_eq!(number_of("1.17.0-dev"), Some((1, 17)));
        assert_eq!(number_of("53.0-246-gae44c2971"), Some((53, 0)));
        assert_eq!(number_of("seven"), None);
    }

    #[tokio::test]
    async fn what_was_found_is_kept_for_as_long_as_nothing_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, cache) = (dir.path().join("kernel"), dir.path().join("cache"));
        fs::write(&kernel, "kernel").unwrap();
        let vmm = |version: &str| VmmInfo {
            name: "vmm".into(),
            version: version.into(),
            accelerator: "kvm".into(),
            reason: String::new(),
        };
        let refuses = async {
            Err(VmmError::Timeout {
                name: "the probe".into(),
                command: "printing".into(),
                seconds: 10,
            })
        };
        let runs = async || Ok(());
        let first = whether_a_kernel_runs(&vmm("1"), &kernel, &cache, runs()).await;
        assert!(first.as_ref().unwrap().contains("got up"));
        let again = whether_a_kernel_runs(&vmm("1"), &kernel, &cache, refuses).await;
        assert_eq!(again, first);
        let refuses = async {
            Err(VmmError::Ended {
                name: "x".into(),
                console: "y".into(),
            })
        };
        let newer = whether_a_kernel_runs(&vmm("2"), &kernel, &cache, refuses).await;
        assert!(newer.unwrap_err().contains("does not get up"));
    }

    #[test]
    fn a_finding_is_kept_only_for_what_it_was_found_with() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("kvm.json");
        let finding = Finding {
            key: "a".into(),
            runs: true,
            reason: "r".into(),
        };
        fs::write(&cache, serde_json::to_vec(&finding).unwrap()).unwrap();
        assert_eq!(Finding::cached(&cache, "a"), Some(finding));
        assert_eq!(Finding::cached(&cache, "b"), None);
        fs::write(&cache, "{").unwrap();
        assert_eq!(Finding::cached(&cache, "a"), None);
    }
}
