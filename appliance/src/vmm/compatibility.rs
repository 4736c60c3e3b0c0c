//! What a build needs of the host that resumes it, and whether this one has it.
//!
//! A build's manifest says which VMM wrote its device state, and on what processor: the guest has
//! looked at that, and has chosen its instructions by it. A host that differs is refused with the
//! difference named, because what would happen otherwise is a guest that dies later.

use std::collections::{BTreeMap, BTreeSet};

use http_api::wire::{CpuInfo, VmmInfo};
use thiserror::Error;

/// What a build says of where it was made; free text in its manifest.
pub type MadeBy = BTreeMap<String, String>;

mod key {
    pub(super) const NAME: &str = "name";
    pub(super) const VERSION: &str = "version";
    pub(super) const ACCELERATOR: &str = "accelerator";
    pub(super) const STATE_FORMAT: &str = "state_format";
    pub(super) const CPU_MODEL: &str = "cpu_model";
    pub(super) const CPU_FLAGS: &str = "cpu_flags";
    pub(super) const KERNEL: &str = "host_kernel";
}

/// Why a build can't be resumed on this host.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Incompatible {
    /// No VMM here reads its device state.
    #[error("It was made by {made_by}, and this host has {here}")]
    Vmm {
        /// The VMM that the build names.
        made_by: String,
        /// Those that there are.
        here: String,
    },
    /// The guest may use instructions that this processor hasn't.
    #[error("It was made on {model}, whose {} this host's processor hasn't", missing.join(", "))]
    Cpu {
        /// The processor that the build names.
        model: String,
        /// What is missing, as the kernel calls it.
        missing: Vec<String>,
    },
}

/// What the manifest of a build is to say.
#[must_use]
pub fn made_by(vmm: &VmmInfo, state_format: &str, cpu: &CpuInfo, kernel: &str) -> MadeBy {
    let mut made_by = MadeBy::from([
        (key::NAME.to_owned(), vmm.name.clone()),
        (key::VERSION.to_owned(), vmm.version.clone()),
        (key::ACCELERATOR.to_owned(), vmm.accelerator.clone()),
        (key::STATE_FORMAT.to_owned(), state_format.to_owned()),
        (key::KERNEL.to_owned(), kernel.to_owned()),
    ]);
    if vmm.accelerator == "kvm" {
        made_by.insert(key::CPU_MODEL.to_owned(), cpu.model.clone());
        made_by.insert(key::CPU_FLAGS.to_owned(), cpu.flags.join(" "));
    }
    made_by
}

/// How well a VMM reads what a build holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fit {
    /// It is another kind, or a version that can't.
    None,
    /// It can, the build says too little to be sure or was made by another version.
    Readable,
    /// It is the one that wrote it.
    Same,
}

/// Judges one VMM.
#[must_use]
pub fn fit(made_by: &MadeBy, vmm: &VmmInfo, state_format: &str) -> Fit {
    let says = |key: &str, found: &str| made_by.get(key).is_none_or(|made| made == found);
    let readable = says(key::NAME, &vmm.name)
        && says(key::ACCELERATOR, &vmm.accelerator)
        && says(key::STATE_FORMAT, state_format);
    match made_by.get(key::VERSION) {
        _ if !readable => Fit::None,
        Some(version) if *version == vmm.version => Fit::Same,
        _ => Fit::Readable,
    }
}

/// Checks the processor. Flags that come and go with the host's kernel and don't reach guests
/// are a reason to refuse, too: nobody could say which those are.
///
/// # Errors
/// [`Incompatible::Cpu`].
pub fn check_cpu(made_by: &MadeBy, here: &CpuInfo) -> Result<(), Incompatible> {
    let Some(flags) = made_by.get(key::CPU_FLAGS) else {
        return Ok(());
    };
    let here: BTreeSet<&str> = here.flags.iter().map(String::as_str).collect();
    let missing: Vec<String> = flags
        .split_whitespace()
        .filter(|flag| !here.contains(flag))
        .map(str::to_owned)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let model = made_by.get(key::CPU_MODEL).cloned().unwrap_or_default();
    Err(Incompatible::Cpu { model, missing })
}

/// A VMM as it is named to people.
#[must_use]
pub fn named(name: &str, version: &str, accelerator: &str, state_format: &str) -> String {
    format!("{name} {version} on {accelerator} (state format {state_format})")
}

/// The VMM that a build was made by, as it is named to people.
#[must_use]
pub fn named_in(made_by: &MadeBy) -> String {
    let get = |key: &str| made_by.get(key).map_or("?", String::as_str);
    named(
        get(key::NAME),
        get(key::VERSION),
        get(key::ACCELERATOR),
        get(key::STATE_FORMAT),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vmm(version: &str) -> VmmInfo {
        VmmInfo {
            name: "firecracker".into(),
            version: version.into(),
            accelerator: "kvm".into(),
            reason: String::new(),
        }
    }

    fn cpu(flags: &[&str]) -> CpuInfo {
        CpuInfo {
            model: "Some CPU".into(),
            threads: 1,
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
        }
    }

    #[test]
    fn only_a_vmm_that_reads_the_state_fits() {
        let made = made_by(&vmm("1.16.1"), "9.0.0", &cpu(&["avx"]), "6.12");
        assert_eq!(fit(&made, &vmm("1.16.1"), "9.0.0"), Fit::Same);
        assert_eq!(fit(&made, &vmm("1.16.2"), "9.0.0"), Fit::Readable);
        assert_eq!(fit(&made, &vmm("1.17.0"), "10.0.0"), Fit::None);
        let emulated = VmmInfo {
            accelerator: "tcg".into(),
            ..vmm("1.16.1")
        };
        assert_eq!(fit(&made, &emulated, "9.0.0"), Fit::None);
        let other = VmmInfo {
            name: "qemu".into(),
            ..vmm("1.16.1")
        };
        assert_eq!(fit(&made, &other, "9.0.0"), Fit::None);
        // A build from before this was written down.
        let silent = MadeBy::from([("name".to_owned(), "firecracker".to_owned())]);
        assert_eq!(fit(&silent, &vmm("1.16.1"), "9.0.0"), Fit::Readable);
    }

    #[test]
    fn missing_flags_are_named_and_more_are_fine() {
        let made = made_by(&vmm("1"), "1", &cpu(&["avx", "avx512f", "fpu"]), "6.12");
        assert_eq!(
            check_cpu(&made, &cpu(&["avx", "avx512f", "fpu", "x"])),
            Ok(())
        );
        let refused = check_cpu(&made, &cpu(&["fpu"])).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "It was made on Some CPU, whose avx, avx512f this host's processor hasn't"
        );
    }

    #[test]
    fn an_emulated_guest_does_not_depend_on_the_processor() {
        let emulated = VmmInfo {
            accelerator: "tcg".into(),
            ..vmm("1")
        };
        let made = made_by(&emulated, "1", &cpu(&["avx"]), "6.12");
        assert_eq!(check_cpu(&made, &cpu(&[])), Ok(()));
    }
}
