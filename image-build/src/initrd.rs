//! The initial RAM disk: busybox, the modules and a script that finds the root.
//!
//! It isn't compressed: unpacking would cost an emulated guest more than reading it.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::cpio::Archive;
use crate::kernel::Kernel;
use crate::stamp;
use crate::tools::Tools;

const INIT: &str = include_str!("../assets/initrd-init");

/// Makes `<inputs>/initrd.img`; `false` when it was current.
pub(crate) fn ensure(inputs: &Path, kernel: &Kernel, tools: &Tools) -> Result<bool> {
    let output = inputs.join("initrd.img");
    let key = stamp::digest(format!("1 {INIT} {kernel:?} {tools:?}").as_bytes());
    if stamp::is_current(&output, &key) {
        return Ok(false);
    }
    stamp::write(&output, &archive(inputs, kernel)?)?;
    stamp::record(&output, &key)?;
    Ok(true)
}

fn archive(inputs: &Path, kernel: &Kernel) -> Result<Vec<u8>> {
    let read = |path: &str| {
        fs::read(inputs.join(path)).with_context(|| format!("Reading {path} of the inputs"))
    };
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "modules", "proc", "root", "sys"] {
        archive.directory(directory, 0o755);
    }
    // The kernel opens it for the first process, before anything is mounted.
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("bin/busybox", 0o755, &read("tools/busybox")?);
    for module in &kernel.modules {
        let content = read(&format!("kernel/modules/{module}"))?;
        archive.file(&format!("modules/{module}"), 0o644, &content);
    }
    let order = kernel
        .modules
        .iter()
        .fold(String::new(), |order, module| order + module + "\n");
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}
