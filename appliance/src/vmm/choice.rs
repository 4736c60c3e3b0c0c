//! Which VMM new guests get on this host, and which others are there for old builds.
//!
//! ```text
//!   firecracker configured ───────────────────────────▶ Firecracker, or the daemon says why not
//!   cloud-hypervisor configured ──────────────────────▶ Cloud Hypervisor, in the same way
//!   auto: a Firecracker runs a guest of a few
//!         instructions, and the guests' kernel ───────▶ Firecracker
//!         else, a Cloud Hypervisor does ──────────────▶ Cloud Hypervisor
//!         else, with the reasons ─────────────────────▶ QEMU, on KVM or by emulation
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::Driver;
use super::cloud_hypervisor::{self, CloudHypervisor};
use super::drivers::Drivers;
use super::firecracker::probe::Probe;
use super::firecracker::{Firecracker, Jailer, Options};
use super::own_user::{self, Users};
use super::probing::ProbeError;
use super::qemu::{self, Qemu};
use crate::config::{Config, DriverChoice};
use crate::inventory;

/// Why no VMM can be used.
#[derive(Debug, Error)]
pub enum ChoiceError {
    /// The configuration insists on Firecracker.
    #[error(
        "vmm.driver is \"firecracker\", but it can't be used; see vmm.firecracker and vmm.jailer"
    )]
    Firecracker(#[source] ProbeError),
    /// The configuration insists on Cloud Hypervisor.
    #[error("vmm.driver is \"cloud-hypervisor\", but it can't be used; see vmm.cloud_hypervisor")]
    CloudHypervisor(#[source] ProbeError),
    /// QEMU can't be used, and nothing else can.
    #[error(transparent)]
    Qemu(#[from] qemu::probe::ProbeError),
}

/// Probes what is configured.
///
/// # Errors
/// What is missing and what to do about it.
pub async fn choose(config: &Config) -> Result<Drivers, ChoiceError> {
    let (chosen, others): (Arc<dyn Driver>, Vec<Arc<dyn Driver>>) = match config.vmm.driver {
        DriverChoice::Qemu => (
            Arc::new(qemu(config, "QEMU was configured").await?),
            Vec::new(),
        ),
        DriverChoice::Firecracker => {
            let found = firecracker(config).await;
            let found = found.map_err(ChoiceError::Firecracker)?;
            (Arc::new(found), older_firecrackers(config).await)
        }
        DriverChoice::CloudHypervisor => {
            let found = cloud_hypervisor(config).await;
            let found = found.map_err(ChoiceError::CloudHypervisor)?;
            (Arc::new(found), older_cloud_hypervisors(config).await)
        }
        DriverChoice::Auto => first_that_boots(config).await?,
    };
    Ok(Drivers::new(
        chosen,
        others,
        inventory::cpu(),
        inventory::kernel(),
    ))
}

/// In the order of `auto`.
async fn first_that_boots(
    config: &Config,
) -> Result<(Arc<dyn Driver>, Vec<Arc<dyn Driver>>), ChoiceError> {
    let no_firecracker = match firecracker_if_it_boots(config).await {
        Ok(found) => return Ok((Arc::new(found), older_firecrackers(config).await)),
        Err(error) => format!("no Firecracker: {}", uffd_engine::chain(&error)),
    };
    let neither = match cloud_hypervisor_if_it_boots(config).await {
        Ok(found) => {
            let found = found.because(&no_firecracker);
            return Ok((Arc::new(found), older_cloud_hypervisors(config).await));
        }
        Err(error) => {
            let error = uffd_engine::chain(&error);
            format!("{no_firecracker}; no Cloud Hypervisor: {error}")
        }
    };
    Ok((Arc::new(qemu(config, &neither).await?), Vec::new()))
}

fn probe<'a>(config: &Config, program: &'a Path, run_dir: &'a Path) -> Probe<'a> {
    let jailer = config.vmm.jailer.clone().map(|program| Jailer {
        program,
        first_user: config.vmm.jail_user,
    });
    Probe {
        program,
        jailer,
        run_dir,
        kernels: config.data_dir.join("kernels"),
        patience: Duration::from_secs(config.vmm.command_timeout_s),
    }
}

fn run_dir(config: &Config) -> PathBuf {
    config.run_dir.join("probe")
}

async fn firecracker(config: &Config) -> Result<Firecracker, ProbeError> {
    let program = found_in_path(&config.vmm.firecracker[0]);
    let found = probe(config, &program, &run_dir(config)).run().await?;
    Ok(found.with_options(options(config)))
}

fn options(config: &Config) -> Options {
    Options {
        vsock: config.vmm.vsock,
    }
}

async fn firecracker_if_it_boots(config: &Config) -> Result<Firecracker, ProbeError> {
    let found = firecracker(config).await?;
    let Some(template) = config.templates.first() else {
        return Ok(found);
    };
    let program = found_in_path(&config.vmm.firecracker[0]);
    let run_dir = run_dir(config);
    let probe = probe(config, &program, &run_dir);
    let cache = config.data_dir.join("firecracker-probe.json");
    let booted = probe.try_kernel(&found, &template.kernel, &cache).await?;
    Ok(found.because(&booted))
}

/// Those that builds may need. One that can't be used is logged: its builds are refused then.
async fn older_firecrackers(config: &Config) -> Vec<Arc<dyn Driver>> {
    let mut found: Vec<Arc<dyn Driver>> = Vec::new();
    for program in &config.vmm.firecracker[1..] {
        let program = found_in_path(program);
        match probe(config, &program, &run_dir(config)).run().await {
            Ok(firecracker) => found.push(Arc::new(firecracker.with_options(options(config)))),
            Err(error) => {
                let error = uffd_engine::chain(&error);
                tracing::warn!(program = %program.display(), error, "No VMM for its builds");
            }
        }
    }
    found
}

fn cloud_probe<'a>(
    config: &Config,
    program: &'a Path,
    run_dir: &'a Path,
) -> cloud_hypervisor::probe::Probe<'a> {
    cloud_hypervisor::probe::Probe {
        program,
        run_dir,
        kernels: config.data_dir.join("kernels"),
        patience: Duration::from_secs(config.vmm.command_timeout_s),
        users: users(config),
    }
}

async fn cloud_hypervisor(config: &Config) -> Result<CloudHypervisor, ProbeError> {
    let program = found_in_path(&config.vmm.cloud_hypervisor[0]);
    let found = cloud_probe(config, &program, &run_dir(config))
        .run()
        .await?;
    Ok(found)
}

async fn cloud_hypervisor_if_it_boots(config: &Config) -> Result<CloudHypervisor, ProbeError> {
    let found = cloud_hypervisor(config).await?;
    let Some(template) = config.templates.first() else {
        return Ok(found);
    };
    let program = found_in_path(&config.vmm.cloud_hypervisor[0]);
    let run_dir = run_dir(config);
    let probe = cloud_probe(config, &program, &run_dir);
    let cache = config.data_dir.join("cloud-hypervisor-probe.json");
    let booted = probe.try_kernel(&found, &template.kernel, &cache).await?;
    Ok(found.because(&booted))
}

/// As [`older_firecrackers`].
async fn older_cloud_hypervisors(config: &Config) -> Vec<Arc<dyn Driver>> {
    let mut found: Vec<Arc<dyn Driver>> = Vec::new();
    for program in &config.vmm.cloud_hypervisor[1..] {
        let program = found_in_path(program);
        let probe = cloud_probe(config, &program, &run_dir(config)).run().await;
        match probe {
            Ok(driver) => found.push(Arc::new(driver)),
            Err(error) => {
                let error = uffd_engine::chain(&error);
                tracing::warn!(program = %program.display(), error, "No VMM for its builds");
            }
        }
    }
    found
}

async fn qemu(config: &Config, reason: &str) -> Result<Qemu, ChoiceError> {
    let kernel = config.templates.first();
    let kernel = kernel.map_or_else(|| "/vmlinuz".into(), |template| template.kernel.clone());
    let cache = config.data_dir.join("kvm-probe.json");
    let (vmm, preload) = (&config.vmm, config.preload());
    let (choice, boot_time) = (vmm.accelerator, Duration::from_secs(vmm.boot_timeout_s));
    let probing = qemu::probe::probe(&vmm.qemu, &preload, choice, &kernel, &cache, boot_time);
    let mut found = probing.await?;
    let who = match users(config) {
        Ok(users) => match qemu::probe::try_users(&found, users).await {
            Ok(()) => {
                found.users = Some(users);
                users.to_string()
            }
            Err(error) => {
                let reason = error.to_string();
                tracing::warn!(reason, "QEMUs run as the daemon's user");
                format!("as the daemon's user ({reason})")
            }
        },
        Err(reason) => format!("as the daemon's user ({reason})"),
    };
    found.info.reason = format!("{}; {who}; {reason}", found.info.reason);
    Ok(found)
}

/// Who VMMs without a jailer are to be, or why no other than the daemon's user.
fn users(config: &Config) -> Result<Users, String> {
    if !config.vmm.own_users {
        return Err("vmm.own_users is false".to_owned());
    }
    if !nix::unistd::geteuid().is_root() {
        return Err("the daemon is not root".to_owned());
    }
    let templates = config.templates.iter();
    let files = templates.flat_map(|of| [of.kernel.as_path(), of.initrd.as_path()]);
    if let Some(path) = own_user::unreadable(files) {
        return Err(format!("{} can't be read by others", path.display()));
    }
    Ok(Users::new(config.vmm.jail_user))
}

/// A jailer wants a path, not a name.
fn found_in_path(program: &Path) -> PathBuf {
    if program.components().count() > 1 {
        return program.to_owned();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| program.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_looked_up_and_a_path_is_taken() {
        let shell = found_in_path(Path::new("sh"));
        assert!(shell.is_absolute() && shell.is_file(), "{shell:?}");
        let given = Path::new("/nonexistent/firecracker");
        assert_eq!(found_in_path(given), given);
        let unknown = Path::new("no-such-program-anywhere");
        assert_eq!(found_in_path(unknown), unknown);
    }
}
