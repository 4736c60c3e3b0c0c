//! envd, linked statically for the guest.
//!
//! It has a target directory of its own: its flags differ from everybody else's, and would throw
//! the main one's artefacts away. Naming the target keeps the flags off build scripts.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::invocation::output;
use crate::progress::step;
use crate::workspace::Workspace;

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Guests pay for it page by page.
const MOST_BYTES: u64 = 8 << 20;

/// Builds it if its sources have changed; gives its path.
pub(crate) fn ensure(workspace: &Workspace) -> Result<PathBuf> {
    let target = workspace.target().join("guest");
    let mut build = workspace.cargo();
    build
        .args([
            "build",
            "--quiet",
            "-p",
            "envd",
            "--profile",
            "envd",
            "--target",
            TRIPLE,
        ])
        .env("CARGO_TARGET_DIR", &target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    step("building envd for the guest", || output(&mut build)).context(
        "Building envd for the guest; it needs a C linker (apt-get install gcc libc6-dev)",
    )?;
    let binary = target.join(TRIPLE).join("envd").join("envd");
    let size = binary
        .metadata()
        .with_context(|| format!("Finding {}", binary.display()))?
        .len();
    ensure!(
        size <= MOST_BYTES,
        "envd has {size} bytes; the limit is {MOST_BYTES}"
    );
    Ok(binary)
}
