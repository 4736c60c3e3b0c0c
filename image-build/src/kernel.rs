//! The guest's kernel: Debian's cloud kernel and the few modules it needs to find its disk.
//!
//! It is fetched once and then kept: a newer one comes with `rm -r <target>/inputs/kernel`.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::modules::{Modules, read_tree};
use crate::packages::Archive;
use crate::progress::step;
use crate::stamp;

/// The package that always stands for the newest cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// What a guest needs before it can load anything from its disk; with what they depend on.
const WANTED: [&str; 7] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio_rng",
    "ext4",
];

/// Modules that make the above faster or that they find by name at run time.
const HELPFUL: [&str; 2] = ["crc32c_generic", "crc32c_intel"];

/// What an emulated machine has that plays a host: device-mapper, files as block devices, the KVM
/// of the processor that QEMU emulates, and what a sandbox's network consists of.
const OF_A_HOST: [&str; 11] = [
    "dm_snapshot",
    "loop",
    "kvm_amd",
    "tun",
    "veth",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_ct",
    "nf_conntrack_netlink",
    "sch_tbf",
];

/// What was fetched; `<inputs>/kernel/source.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kernel {
    /// What was asked for, so that a change of it fetches anew.
    recipe: String,
    /// Debian's package.
    pub(crate) package: String,
    /// Its version.
    pub(crate) version: String,
    /// What `uname -r` says in the guest.
    pub(crate) release: String,
    /// Files of `modules/`, in the order in which they are loaded.
    pub(crate) modules: Vec<String>,
    /// Files of `host-modules/`, the same way; no guest loads them.
    pub(crate) host_modules: Vec<String>,
}

/// The kernel in `<inputs>/kernel`: `vmlinuz`, `modules/*.ko`, `host-modules/*.ko`, `source.json`.
pub(crate) fn ensure(archive: &Archive, inputs: &Path) -> Result<Kernel> {
    let place = inputs.join("kernel");
    let record = fs::read(place.join("source.json")).ok();
    let known: Option<Kernel> = record.and_then(|json| serde_json::from_slice(&json).ok());
    match known {
        Some(kernel) if kernel.recipe == recipe() => Ok(kernel),
        _ => step("fetching the guest's kernel", || fetch(archive, &place))
            .context("Fetching the guest's kernel"),
    }
}

fn recipe() -> String {
    format!(
        "2 {META_PACKAGE} {}",
        [WANTED.as_slice(), &HELPFUL, &OF_A_HOST].concat().join(" ")
    )
}

fn fetch(archive: &Archive, place: &Path) -> Result<Kernel> {
    let package = archive.dependency_of(META_PACKAGE, "linux-image-")?;
    let unpacked = stamp::fresh_directory(&place.with_file_name("kernel-package"))?;
    let version = archive.unpack(&package, &unpacked)?;
    let release = package
        .strip_prefix("linux-image-")
        .unwrap_or(&package)
        .to_owned();

    let fresh = stamp::fresh_directory(place)?;
    let image = unpacked.join(format!("boot/vmlinuz-{release}"));
    fs::copy(&image, fresh.join("vmlinuz"))
        .with_context(|| format!("Copying {}", image.display()))?;
    let tree = unpacked.join("lib/modules").join(&release);
    let wanted = [WANTED.as_slice(), &HELPFUL].concat();
    let modules = keep_modules(&tree, &wanted, &fresh.join("modules"))?;
    let host_modules = keep_modules(&tree, &OF_A_HOST, &fresh.join("host-modules"))?;
    let kernel = Kernel {
        recipe: recipe(),
        package,
        version,
        release,
        modules,
        host_modules,
    };
    fs::write(
        fresh.join("source.json"),
        serde_json::to_vec_pretty(&kernel)?,
    )
    .context("Writing the kernel's source.json")?;
    fs::remove_dir_all(&unpacked).context("Removing the unpacked kernel package")?;
    stamp::publish(&fresh, place)?;
    Ok(kernel)
}

/// Keeps modules and what they need; gives their files in the order in which they are loaded,
/// which is in `order`, too.
fn keep_modules(tree: &Path, wanted: &[&str], directory: &Path) -> Result<Vec<String>> {
    let files = read_tree(tree)?;
    let mut modules = Modules::default();
    for (stem, content) in files.values() {
        modules.add(stem, content);
    }
    fs::create_dir(directory).context("Creating the modules' directory")?;
    let mut kept = Vec::new();
    for name in modules.load_order(wanted) {
        let Some((stem, content)) = files.get(&name) else {
            continue;
        };
        let file = format!("{stem}.ko");
        fs::write(directory.join(&file), content).with_context(|| format!("Writing {file}"))?;
        kept.push(file);
    }
    fs::write(directory.join("order"), kept.join("\n") + "\n")
        .context("Writing the modules' order")?;
    Ok(kept)
}
