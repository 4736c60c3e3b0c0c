//! What the tests need of their surroundings, and what is missing.

use std::env;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use uffd_engine::sys::uffd::{FEATURE_EVENT_REMOVE, FEATURE_MISSING_SHMEM, Uffd};

/// Kernel, initial RAM disk, disk image and preload library.
#[derive(Clone, Debug)]
pub(crate) struct GuestInputs {
    pub(crate) dir: PathBuf,
    pub(crate) preload: PathBuf,
}

/// The program under test: as given, else the one built with this test.
pub(crate) fn thaw() -> PathBuf {
    env::var_os("THAW_BIN").map_or_else(|| env!("CARGO_BIN_EXE_thaw").into(), PathBuf::from)
}

/// Guests want both cores: in one process, they come one after the other.
pub(crate) fn one_at_a_time() -> MutexGuard<'static, ()> {
    static GUESTS: Mutex<()> = Mutex::new(());
    GUESTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a daemon needs whose VMM is a fake; otherwise what is missing.
pub(crate) fn for_fakes() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("not root".into());
    }
    Uffd::create(FEATURE_EVENT_REMOVE | FEATURE_MISSING_SHMEM)
        .map_err(|error| format!("no userfaultfd: {error}"))
        .map(|_| ())
}

/// The program of a real VMM, as a variable names it; otherwise what is missing.
pub(crate) fn real(vmm: &str, variable: &str) -> Result<PathBuf, String> {
    for_fakes()?;
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("no /dev/kvm: {error}"))?;
    given(variable).ok_or_else(|| format!("no {vmm} given ({variable})"))
}

/// The program that a variable names, if it is set.
pub(crate) fn given(variable: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env::var_os(variable)?);
    assert!(
        path.is_file(),
        "{variable} is {}, which is no file",
        path.display()
    );
    Some(path)
}

/// The VMM that guests are tested on.
#[derive(Clone, Debug)]
pub(crate) enum TestedVmm {
    /// QEMU on an accelerator.
    Qemu(&'static str),
    /// Another driver's, with its program.
    Other(&'static str, PathBuf),
}

/// QEMU by emulation, unless `THAW_TEST_VMM` names another one.
pub(crate) fn vmm() -> TestedVmm {
    let other = |driver, variable| TestedVmm::Other(driver, file_of(variable).unwrap());
    match env::var("THAW_TEST_VMM").as_deref() {
        Err(_) => TestedVmm::Qemu("tcg"),
        Ok("qemu-kvm") => TestedVmm::Qemu("kvm"),
        Ok("firecracker") => other("firecracker", "THAW_FIRECRACKER"),
        Ok("cloud-hypervisor") => other("cloud-hypervisor", "THAW_CLOUD_HYPERVISOR"),
        Ok(name) => panic!("THAW_TEST_VMM is {name}: qemu-kvm, firecracker or cloud-hypervisor"),
    }
}

/// What a daemon needs before any guest; otherwise what is missing.
pub(crate) fn for_daemons() -> Result<PathBuf, String> {
    for_fakes()?;
    if let TestedVmm::Other(..) = vmm() {
        return Ok(PathBuf::new());
    }
    let qemu = "qemu-system-x86_64";
    let path = env::var_os("PATH").unwrap_or_default();
    if !env::split_paths(&path).any(|dir| dir.join(qemu).is_file()) {
        return Err(format!("no {qemu}"));
    }
    file_of("THAW_PRELOAD")
}

/// What guests need; otherwise what is missing.
pub(crate) fn for_guests() -> Result<GuestInputs, String> {
    let preload = for_daemons()?;
    let dir = PathBuf::from(
        env::var_os("THAW_INPUTS").ok_or("THAW_INPUTS is not set; `cargo verify` sets it")?,
    );
    for name in ["vmlinuz", "initrd.img", "base.ext4"] {
        if !dir.join(name).is_file() {
            return Err(format!("no {name} in THAW_INPUTS"));
        }
    }
    Ok(GuestInputs { dir, preload })
}

fn file_of(variable: &str) -> Result<PathBuf, String> {
    let path = env::var_os(variable)
        .ok_or_else(|| format!("{variable} is not set; `cargo verify` sets it"))?;
    let path = Path::new(&path).to_owned();
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!(
            "{variable} is {}, which is no file",
            path.display()
        ))
    }
}
