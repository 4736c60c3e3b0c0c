//! The guest's two programs besides envd: a static busybox and a static bash.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::packages::Archive;
use crate::progress::step;
use crate::stamp;

/// Package, the program inside it, and its name here.
const PROGRAMS: [(&str, &str, &str); 2] = [
    ("busybox-static", "bin/busybox", "busybox"),
    ("bash-static", "bin/bash-static", "bash"),
];

/// What was fetched; `<inputs>/tools/source.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tools {
    /// Package and version of each program.
    pub(crate) packages: Vec<(String, String)>,
}

/// The programs in `<inputs>/tools`: `busybox`, `bash`, `source.json`.
pub(crate) fn ensure(archive: &Archive, inputs: &Path) -> Result<Tools> {
    let place = inputs.join("tools");
    let record = fs::read(place.join("source.json")).ok();
    let known: Option<Tools> = record.and_then(|json| serde_json::from_slice(&json).ok());
    match known {
        Some(tools) if tools.packages.len() == PROGRAMS.len() => Ok(tools),
        _ => step("fetching the guest's tools", || fetch(archive, &place))
            .context("Fetching the guest's busybox and bash"),
    }
}

fn fetch(archive: &Archive, place: &Path) -> Result<Tools> {
    let fresh = stamp::fresh_directory(place)?;
    let mut packages = Vec::new();
    for (package, program, name) in PROGRAMS {
        let unpacked = stamp::fresh_directory(&place.with_file_name("tool-package"))?;
        let version = archive.unpack(package, &unpacked)?;
        let from = unpacked.join(program);
        fs::copy(&from, fresh.join(name)).with_context(|| format!("Copying {}", from.display()))?;
        fs::remove_dir_all(&unpacked).context("Removing an unpacked package")?;
        packages.push((package.to_owned(), version));
    }
    let tools = Tools { packages };
    fs::write(
        fresh.join("source.json"),
        serde_json::to_vec_pretty(&tools)?,
    )
    .context("Writing the tools' source.json")?;
    stamp::publish(&fresh, place)?;
    Ok(tools)
}
