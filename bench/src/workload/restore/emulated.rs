//! The same in an emulated machine with Debian's kernel, whose KVM brings up stock guests where the
//! host's doesn't: this program runs there again. Times are the emulation's; ratios are not.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::config::{self, Vmm};
use crate::machine::{self, Machine};

/// Boots in boots, and every restore a few seconds.
const LIMIT: Duration = Duration::from_secs(3 * 3600);
const MEMORY_MB: u32 = 3072;

/// Runs it there, and prints what it prints.
pub(super) fn run(config: &config::Restore) -> Result<()> {
    let inputs = config
        .inputs
        .as_deref()
        .context("--emulated needs --inputs")?;
    if let Some(reason) = machine::missing(Some(inputs)) {
        bail!("No machine can be emulated: {reason}");
    }
    let (option, program) = match &config.vmm {
        Vmm::Firecracker(program) => ("--firecracker", program),
        Vmm::CloudHypervisor(program) => ("--cloud-hypervisor", program),
        Vmm::Qemu { .. } => bail!("--emulated is for Firecracker and Cloud Hypervisor"),
    };
    let (rounds, restores) = (config.rounds.to_string(), config.restores.to_string());
    let arguments = [
        "restore",
        option,
        "/vmm",
        "--inputs",
        "/inputs",
        "--rounds",
        &rounds,
        "--restores",
        &restores,
    ];
    let mut machine = Machine::new(inputs)
        .memory_mb(MEMORY_MB)
        .program(program, "/vmm")
        .set("PATH", "/bin:/usr/bin");
    for name in ["vmlinuz", "initrd.img", "base.ext4"] {
        machine = machine.file(inputs.join(name), format!("/inputs/{name}"));
    }
    let (code, _lines) = machine.run_self(&arguments, LIMIT);
    ensure!(code == 0, "In the machine it ended with {code}");
    Ok(())
}
