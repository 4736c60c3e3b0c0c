//! `[[template]]`: what sandboxes boot from, and the limits of their shape.

use std::fs;
use std::path::PathBuf;

use http_api::ids::TemplateName;
use serde::Deserialize;

/// What ext4 takes.
const MAX_DISK_MB: u64 = 16 << 20;

/// `[[template]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateConfig {
    /// What sandboxes name it by.
    pub name: TemplateName,
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// Raw disk image with the root file system.
    pub disk: PathBuf,
    /// Added to the kernel's command line.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
    /// Virtual CPUs unless a request says otherwise.
    #[serde(default = "default_vcpus")]
    pub vcpus: u32,
    /// Memory in MiB unless a request says otherwise.
    #[serde(default = "default_memory_mb")]
    pub memory_mb: u32,
    /// Whether their memory is of huge pages unless a request says otherwise.
    #[serde(default)]
    pub huge_pages: bool,
    /// MiB of the disks unless a request says otherwise; the image's own size when absent.
    #[serde(default)]
    pub disk_size_mb: Option<u64>,
}

impl TemplateConfig {
    /// The field that can't be, and why.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        check_shape(self.vcpus, self.memory_mb, self.huge_pages)?;
        for (field, file) in [
            ("kernel", &self.kernel),
            ("initrd", &self.initrd),
            ("disk", &self.disk),
        ] {
            if !file.is_file() {
                return Err((field, format!("is {}, which is no file", file.display())));
            }
        }
        if let Some(size_mb) = self.disk_size_mb {
            let image = fs::metadata(&self.disk).map_or(0, |image| image.len());
            check_disk_size(size_mb, image).map_err(|problem| ("disk_size_mb", problem))?;
        }
        Ok(())
    }
}

fn default_cmdline() -> String {
    "quiet".into()
}
const fn default_vcpus() -> u32 {
    1
}
const fn default_memory_mb() -> u32 {
    512
}

/// The limits of a guest's shape, for configuration and requests alike.
///
/// # Errors
/// Which of the two, and what would do.
pub fn check_shape(
    vcpus: u32,
    memory_mb: u32,
    huge_pages: bool,
) -> Result<(), (&'static str, String)> {
    if !(1..=64).contains(&vcpus) {
        return Err(("vcpus", format!("is {vcpus}; 1 to 64 are possible")));
    }
    if !(64..=1 << 20).contains(&memory_mb) {
        return Err((
            "memory_mb",
            format!("is {memory_mb}; 64 to 1048576 are possible"),
        ));
    }
    if huge_pages && !memory_mb.is_multiple_of(2) {
        let problem = format!("is {memory_mb}; memory of huge pages has a multiple of 2");
        return Err(("memory_mb", problem));
    }
    Ok(())
}

/// The limits of a disk that is made from an image of so many bytes.
///
/// # Errors
/// What would do.
pub fn check_disk_size(size_mb: u64, image_bytes: u64) -> Result<(), String> {
    let least = image_bytes.div_ceil(1 << 20).max(1);
    if (least..=MAX_DISK_MB).contains(&size_mb) {
        return Ok(());
    }
    Err(format!(
        "is {size_mb}; {least} (the image has that) to {MAX_DISK_MB} are possible"
    ))
}
