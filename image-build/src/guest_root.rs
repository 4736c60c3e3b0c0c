//! The guest's root `base.ext4`: busybox, bash, envd and a dozen small files, made without mounting.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use envd::protocol::network;

use crate::invocation::output;
use crate::progress::step;
use crate::stamp;

/// Logical size; the file is sparse.
const SIZE_MIB: u32 = 128;
/// Fixed, so that the same content makes the same file system.
const UUID: &str = "7e6d2b1c-5d0f-4a6e-9c53-2f1b8a90d4c7";
/// 2025-01-01, the time of everything in it.
const TIME: &str = "1735689600";
/// The unprivileged user.
const USER_ID: u32 = 1000;

const INIT: &str = include_str!("../assets/init");

const FILES: [(&str, &str); 8] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/bash\n\
         user:x:1000:1000:user:/home/user:/bin/bash\n\
         nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    ),
    (
        "etc/group",
        "root:x:0:\ntty:x:5:\nuser:x:1000:\nnogroup:x:65534:\n",
    ),
    ("etc/hostname", "sandbox\n"),
    ("etc/hosts", "127.0.0.1 localhost sandbox\n::1 localhost\n"),
    // The gateway: every host sends lookups on to a resolver of its own.
    ("etc/resolv.conf", "nameserver 169.254.100.1\n"),
    (
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files dns\n",
    ),
    ("etc/shells", "/bin/sh\n/bin/bash\n"),
    (
        "etc/profile",
        "[ -n \"$PS1\" ] && PS1='\\u@\\h:\\w\\$ '\numask 022\n",
    ),
];

const DIRECTORIES: [&str; 16] = [
    "dev",
    "etc",
    "home/user",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "usr/bin",
    "usr/lib",
    "usr/local/bin",
    "usr/local/sbin",
    "usr/sbin",
    "var/log",
    "var/tmp",
    "srv",
];

/// Makes `<inputs>/base.ext4`; `false` when it was current.
pub(crate) fn ensure(inputs: &Path, envd: &Path) -> Result<bool> {
    let output = inputs.join("base.ext4");
    let parts = [
        envd,
        &inputs.join("tools/busybox"),
        &inputs.join("tools/bash"),
    ];
    let digests = parts
        .map(stamp::digest_file)
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let recipe = format!(
        "2 {SIZE_MIB} {UUID} {TIME} {} {FILES:?} {DIRECTORIES:?}",
        init()
    );
    let key = stamp::digest(format!("{recipe} {digests:?}").as_bytes());
    if stamp::is_current(&output, &key) {
        return Ok(false);
    }
    step("making the guest's root", || make(inputs, envd, &output))?;
    stamp::record(&output, &key)?;
    Ok(true)
}

fn make(inputs: &Path, envd: &Path, output: &Path) -> Result<()> {
    let tree = stamp::fresh_directory(&inputs.join("root-tree"))?;
    fill(&tree, inputs, envd).context("Laying out the guest's root; this needs root")?;
    let image = stamp::sibling(output);
    make_file_system(&tree, &image)?;
    fs::remove_dir_all(&tree).context("Removing the laid out root")?;
    stamp::publish(&image, output)
}

fn fill(tree: &Path, inputs: &Path, envd: &Path) -> Result<()> {
    for directory in DIRECTORIES {
        fs::create_dir_all(tree.join(directory))?;
    }
    for (link, target) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib")] {
        symlink(target, tree.join(link))?;
    }
    for (path, text) in FILES {
        fs::write(tree.join(path), text)?;
    }
    for (from, to) in [
        (inputs.join("tools/busybox"), "usr/bin/busybox"),
        (inputs.join("tools/bash"), "usr/bin/bash"),
        (envd.to_path_buf(), "usr/bin/envd"),
    ] {
        fs::copy(&from, tree.join(to)).with_context(|| format!("Copying {}", from.display()))?;
        permit(&tree.join(to), 0o755)?;
    }
    fs::write(tree.join("usr/sbin/init"), init())?;
    permit(&tree.join("usr/sbin/init"), 0o755)?;
    for applet in output(Command::new(inputs.join("tools/busybox")).arg("--list"))?.lines() {
        let link = tree.join("usr/bin").join(applet);
        // Ours come first: bash, and init, which is found in /usr/sbin.
        if applet != "init" && link.symlink_metadata().is_err() {
            symlink("busybox", link)?;
        }
    }
    for (path, mode) in [("tmp", 0o1777), ("var/tmp", 0o1777), ("root", 0o700)] {
        permit(&tree.join(path), mode)?;
    }
    chown(tree.join("home/user"), Some(USER_ID), Some(USER_ID))?;
    Ok(())
}

fn permit(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("Setting the mode of {}", path.display()))
}

/// The init script with the defaults of the guest's address.
fn init() -> String {
    INIT.replace("@ADDRESS_PARAMETER@", network::ADDRESS_PARAMETER)
        .replace("@GATEWAY_PARAMETER@", network::GATEWAY_PARAMETER)
        .replace(
            "@ADDRESS@",
            &format!("{}/{}", network::GUEST_ADDRESS, network::PREFIX_LENGTH),
        )
        .replace("@GATEWAY@", network::GATEWAY)
}

/// No reserved blocks, a 4 MiB journal, and nothing left for the guest's kernel to initialise in
/// the background, which would dirty its pages and its disk.
fn make_file_system(tree: &Path, image: &Path) -> Result<()> {
    let _ = fs::remove_file(image);
    let options =
        format!("hash_seed={UUID},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,nodiscard");
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args([
        "-q",
        "-F",
        "-m",
        "0",
        "-N",
        "8192",
        "-J",
        "size=4",
        "-L",
        "thaw-root",
        "-U",
        UUID,
        "-E",
        &options,
    ])
    .arg("-d")
    .arg(tree)
    .arg(image)
    .arg(format!("{SIZE_MIB}M"))
    .env("E2FSPROGS_FAKE_TIME", TIME)
    .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    output(&mut mkfs).context("Making the guest's file system")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_script_has_the_shared_address() {
        let script = init();
        assert!(script.contains("address=169.254.100.2/30\n"), "{script}");
        assert!(script.contains("gateway=169.254.100.1\n"));
        assert!(script.contains("thaw.ip=*)"));
        assert!(!script.contains('@'), "{script}");
    }
}
