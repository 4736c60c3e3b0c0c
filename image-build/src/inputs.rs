//! `<target>/inputs`: all that a guest is booted from, and `inputs.json` that describes it.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context as _, Result};
use envd::protocol::network;
use serde::Serialize;

use crate::kernel::Kernel;
use crate::packages::Archive;
use crate::tools::Tools;
use crate::workspace::Workspace;
use crate::{guest_daemon, guest_root, initrd, kernel, stamp, tools};

/// `inputs.json`.
#[derive(Debug, Serialize)]
struct Inputs<'a> {
    kernel: KernelEntry<'a>,
    initrd: FileEntry,
    root: FileEntry,
    envd: EnvdEntry,
    /// Package and version of the guest's tools.
    tools: &'a [(String, String)],
    /// Kernel parameters that every guest of these inputs wants; the console is the host's choice.
    kernel_parameters: String,
}

#[derive(Debug, Serialize)]
struct KernelEntry<'a> {
    release: &'a str,
    package: &'a str,
    version: &'a str,
    modules: &'a [String],
    #[serde(flatten)]
    file: FileEntry,
}

#[derive(Debug, Serialize)]
struct EnvdEntry {
    version: &'static str,
    compat_version: &'static str,
    bytes: u64,
    sha256: String,
}

#[derive(Debug, Serialize)]
struct FileEntry {
    /// Relative to the directory of `inputs.json`.
    file: &'static str,
    bytes: u64,
    sha256: String,
}

/// Makes what is missing or out of date. Only one process does so at a time.
pub(crate) fn prepare(workspace: &Workspace) -> Result<()> {
    let inputs = workspace.inputs();
    fs::create_dir_all(&inputs).with_context(|| format!("Creating {}", inputs.display()))?;
    let lock = File::create(inputs.join(".lock")).context("Creating the inputs' lock")?;
    lock.lock()
        .context("Waiting for another run to finish the inputs")?;

    let archive = Archive::default();
    archive.install_needed()?;
    let kernel = kernel::ensure(&archive, &inputs)?;
    let tools = tools::ensure(&archive, &inputs)?;
    let envd = guest_daemon::ensure(workspace)?;
    let mut changed = copy_kernel(&inputs)?;
    changed |= initrd::ensure(&inputs, &kernel, &tools)?;
    changed |= guest_root::ensure(&inputs, &envd)?;
    if changed || !inputs.join("inputs.json").exists() {
        describe(&inputs, &kernel, &tools, &envd)?;
    }
    Ok(())
}

/// `vmlinuz` beside the others; `false` when it was current.
fn copy_kernel(inputs: &Path) -> Result<bool> {
    let (from, to) = (inputs.join("kernel/vmlinuz"), inputs.join("vmlinuz"));
    let content = fs::read(&from).with_context(|| format!("Reading {}", from.display()))?;
    if fs::read(&to).is_ok_and(|present| present == content) {
        return Ok(false);
    }
    stamp::write(&to, &content)?;
    Ok(true)
}

fn describe(inputs: &Path, kernel: &Kernel, tools: &Tools, envd: &Path) -> Result<()> {
    let measure = |path: &Path| -> Result<(u64, String)> {
        let bytes = fs::metadata(path).with_context(|| format!("Finding {}", path.display()))?;
        Ok((bytes.len(), stamp::digest_file(path)?))
    };
    let entry = |file: &'static str| -> Result<FileEntry> {
        let (bytes, sha256) = measure(&inputs.join(file))?;
        Ok(FileEntry {
            file,
            bytes,
            sha256,
        })
    };
    let (bytes, sha256) = measure(envd)?;
    let description = Inputs {
        kernel: KernelEntry {
            release: &kernel.release,
            package: &kernel.package,
            version: &kernel.version,
            modules: &kernel.modules,
            file: entry("vmlinuz")?,
        },
        initrd: entry("initrd.img")?,
        root: entry("base.ext4")?,
        envd: EnvdEntry {
            // The crates of this workspace share one version.
            version: env!("CARGO_PKG_VERSION"),
            compat_version: envd::protocol::COMPAT_VERSION,
            bytes,
            sha256,
        },
        tools: &tools.packages,
        kernel_parameters: network::kernel_parameters(),
    };
    let mut json = serde_json::to_vec_pretty(&description).context("Describing the inputs")?;
    json.push(b'\n');
    stamp::write(&inputs.join("inputs.json"), &json)
}
