//! Which Firecracker, does it run guests here, and does it write a device state by itself?
//!
//! A guest of a few instructions is started, stopped, saved without memory, and loaded again:
//! what all later pauses rely on is seen before the first of them. Whether a stock kernel gets
//! up is another question (nested and paravirtual KVMs run the one and not the other), and is put
//! by starting the kernel that guests will use; that answer is kept for as long as neither the
//! host's boot, nor Firecracker, nor the kernel changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use http_api::wire::VmmInfo;

use super::command::{Jailer, Layout, Parts, STATE};
use super::machine::{FirecrackerMachine, MemorySource};
use super::saving::misplaces;
use super::{Firecracker, Options, StateOnly, probe_guest};
use crate::vmm::probe_guest::SAYS;
use crate::vmm::probing::{self, KERNEL_TIME, MISSES_ITS_ROOT, ProbeError};
use crate::vmm::{Machine, VmmError, kernel_image};

/// The oldest that has all we use.
const OLDEST: (u32, u32) = (1, 13);
/// Free page reporting came with this one.
pub(super) const WITH_REPORTING: (u32, u32) = (1, 14);
/// See [`state_format`]. Source: `SNAPSHOT_VERSION` in `src/vmm/src/persist.rs` of both.
const AMBIGUOUS: &str = "8.0.0";
const PROBE_MEMORY_MB: u32 = 32;
const PROBE_MEMORY: &str = "probe-memory";
const NAME: &str = "the probe";

/// What to look at, and where there is room for it.
#[derive(Clone, Debug)]
pub struct Probe<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its jailer, if it is to be started by one.
    pub jailer: Option<Jailer>,
    /// A directory for sockets, which is emptied.
    pub run_dir: &'a Path,
    /// Where unpacked kernels are kept.
    pub kernels: PathBuf,
    /// How long it may take for one command.
    pub patience: Duration,
}

impl Probe<'_> {
    /// Finds out about one Firecracker.
    ///
    /// # Errors
    /// Why it can't be used.
    pub async fn run(&self) -> Result<Firecracker, ProbeError> {
        let version = probing::version_of(self.program, "--version").await?;
        let number = probing::new_enough(self.program, &version, OLDEST)?;
        let said = probing::version_of(self.program, "--snapshot-version").await?;
        let state_format = state_format(said, number);
        let misplaces = misplaces(&version);
        let mut firecracker = Firecracker {
            program: self.program.to_owned(),
            jailer: self.jailer.clone(),
            info: VmmInfo {
                name: "firecracker".into(),
                version,
                accelerator: "kvm".into(),
                reason: String::new(),
            },
            state_format,
            state_only: StateOnly::Unknown,
            misplaces,
            free_page_reporting: number >= WITH_REPORTING,
            patience: self.patience,
            kernels: self.kernels.clone(),
            options: Options::default(),
        };
        let started = Instant::now();
        let state_only = self.try_guest(&firecracker).await;
        crate::host::remove_dir(self.run_dir);
        let state_only = state_only?;
        let took = started.elapsed();
        let memory = match &state_only {
            Ok(()) => {
                firecracker.state_only = StateOnly::Works;
                "states are saved by themselves".to_owned()
            }
            Err(error) => {
                let error = uffd_engine::chain(error);
                format!("memory is saved by Firecracker, because a state alone is not ({error})")
            }
        };
        let jail = match &self.jailer {
            Some(_) => "in a jail",
            None => "without a jailer, as root",
        };
        let lacking: String = [
            (
                !firecracker.free_page_reporting,
                "; pages that guests free stay theirs (it is older than 1.14)",
            ),
            (
                firecracker.misplaces,
                "; guests of more than 3 GiB are first saved whole (it misplaces pages)",
            ),
        ]
        .into_iter()
        .filter_map(|(lacks, text)| lacks.then_some(text))
        .collect();
        firecracker.info.reason =
            format!("a guest ran {jail} and was saved and loaded in {took:.1?}; {memory}{lacking}");
        Ok(firecracker)
    }

    /// Boots, stops, saves and loads; whether the save can do without memory.
    async fn try_guest(
        &self,
        firecracker: &Firecracker,
    ) -> Result<Result<(), VmmError>, ProbeError> {
        let failed = ProbeError::guest(self.program);
        let kernel = self.run_dir.join("probe.elf");
        crate::host::remove_dir(self.run_dir);
        probing::write(&kernel, &probe_guest::elf())?;
        let shape = probing::shape(&kernel, PROBE_MEMORY_MB);
        let layout = || Layout::new(self.run_dir, 0, self.program, self.jailer.as_ref());
        let parts = Parts {
            kernel: Some(&kernel),
            initrd: None,
            disk: None,
            namespace: None,
            memory_bytes: shape.memory_bytes(),
            cgroup: None,
        };
        let mut machine = FirecrackerMachine::start(firecracker, NAME, layout(), &parts)
            .await
            .map_err(&failed)?;
        machine
            .boot(&shape, &kernel, None, false)
            .await
            .map_err(&failed)?;
        probing::says(NAME, &machine.console(), SAYS, self.patience)
            .await
            .map_err(&failed)?;
        machine.stop().await.map_err(&failed)?;
        let state = match machine.save_state_only().await {
            Ok(state) => state,
            Err(error) => return Ok(Err(error)),
        };
        // It has to be of use to go on, too.
        machine.go_on().await.map_err(failed)?;
        machine.kill().await;
        probing::write(&layout().dir.join(STATE), &state)?;
        let memory = layout().dir.join(PROBE_MEMORY);
        probing::write(&memory, &[])?;
        fs::File::options()
            .write(true)
            .open(&memory)
            .and_then(|file| file.set_len(shape.memory_bytes()))
            .map_err(|source| ProbeError::File {
                path: memory.clone(),
                source,
            })?;
        // Its user has to read it.
        let _ = fs::set_permissions(&memory, std::os::unix::fs::PermissionsExt::from_mode(0o644));
        let loading = async {
            let parts = Parts {
                kernel: None,
                ..parts
            };
            let mut machine =
                FirecrackerMachine::start(firecracker, NAME, layout(), &parts).await?;
            let memory = MemorySource::File(PROBE_MEMORY);
            machine.load(memory, None, false).await?;
            machine.kill().await;
            Ok(())
        };
        Ok(loading.await)
    }

    /// Whether the kernel that guests will use gets as far as missing its root.
    ///
    /// # Errors
    /// [`ProbeError::Kernel`], if it doesn't.
    pub async fn try_kernel(
        &self,
        firecracker: &Firecracker,
        kernel: &Path,
        cache: &Path,
    ) -> Result<String, ProbeError> {
        let booting = self.boot_kernel(firecracker, kernel);
        probing::try_kernel(&firecracker.info, kernel, cache, self.run_dir, booting).await
    }

    async fn boot_kernel(&self, firecracker: &Firecracker, kernel: &Path) -> Result<(), VmmError> {
        let shape = probing::shape(kernel, 256);
        let elf = kernel_image::unpacked(NAME, kernel, &firecracker.kernels).await?;
        let parts = Parts {
            kernel: Some(&elf),
            initrd: None,
            disk: None,
            namespace: None,
            memory_bytes: shape.memory_bytes(),
            cgroup: None,
        };
        let layout = Layout::new(self.run_dir, 0, self.program, self.jailer.as_ref());
        let mut machine = FirecrackerMachine::start(firecracker, NAME, layout, &parts).await?;
        machine.boot(&shape, &elf, None, false).await?;
        let console = machine.console();
        let said = probing::says(NAME, &console, MISSES_ITS_ROOT, KERNEL_TIME).await;
        machine.kill().await;
        said
    }
}

/// The format of device states by what Firecracker says of it. 1.13 and 1.14 say the same, and can't
/// read each other's.
fn state_format(said: String, (major, minor): (u32, u32)) -> String {
    if said == AMBIGUOUS {
        return format!("{said} of {major}.{minor}");
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::probing::number_of;

    #[test]
    fn formats_are_told_apart_where_firecracker_does_not() {
        let format =
            |said: &str, version: &str| state_format(said.to_owned(), number_of(version).unwrap());
        assert_eq!(format("8.0.0", "1.13.0"), format("8.0.0", "1.13.2"));
        assert_ne!(format("8.0.0", "1.13.2"), format("8.0.0", "1.14.4"));
        assert_eq!(format("10.0.0", "1.16.1"), "10.0.0");
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(number_of("1.9.1") < Some(OLDEST));
        assert!(number_of("2.0.0") > Some(WITH_REPORTING));
    }
}
