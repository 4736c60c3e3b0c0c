//! The images of templates as this host keeps them: copied once, so that nobody changes them below
//! the disks that share them, and grown once where a larger disk was asked for.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use parking_lot::Mutex;

use super::error::DiskError;
use super::files;

/// Where in an ext file system its magic number is, and what it is.
/// Source: Linux `fs/ext4/ext4.h`, `struct ext4_super_block`.
const EXT_MAGIC_AT: u64 = 1024 + 0x38;
const EXT_MAGIC: [u8; 2] = 0xEF53_u16.to_le_bytes();

/// The directory of them.
#[derive(Debug)]
pub(super) struct Bases {
    dir: PathBuf,
    /// One is made at a time: the second who wants it finds it.
    making: Mutex<()>,
}

impl Bases {
    /// Opens the directory, and removes what none of these images is any more. What a build still
    /// needs of those has another name there.
    pub(super) fn open(dir: PathBuf, images: &[PathBuf]) -> Result<Self, DiskError> {
        fs::create_dir_all(&dir).map_err(DiskError::file("Making directory", &dir))?;
        let current: BTreeSet<String> = images
            .iter()
            .filter_map(|image| identity(image).ok())
            .collect();
        let entries = fs::read_dir(&dir).map_err(DiskError::file("Listing", &dir))?;
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let image = name.split_once('.').map_or("", |(image, _)| image);
            if !current.contains(image) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(Self {
            dir,
            making: Mutex::new(()),
        })
    }

    /// The kept copy of an image, of its own size or grown. Blocks, for the first one.
    ///
    /// # Errors
    /// The image can't be read, or not be grown.
    pub(super) fn get(&self, image: &Path, size_mb: Option<u64>) -> Result<PathBuf, DiskError> {
        let id = identity(image).map_err(DiskError::file("Looking at", image))?;
        let size = size_mb.map_or_else(|| "whole".to_owned(), |mb| format!("{mb}mb"));
        let base = self.dir.join(format!("{id}.{size}"));
        let _turn = self.making.lock();
        if base.exists() {
            return Ok(base);
        }
        let unfinished = self.dir.join("unfinished");
        files::cheapest_copy(image, &unfinished)?;
        let made = match size_mb {
            Some(mb) => grow(image, &unfinished, mb << 20),
            None => Ok(()),
        };
        // Durable before it has its name: whoever finds it trusts it.
        let published = made.and_then(|()| {
            File::open(&unfinished)
                .and_then(|file| file.sync_all())
                .and_then(|()| fs::rename(&unfinished, &base))
                .map_err(DiskError::file("Keeping", &base))
        });
        published.inspect_err(|_| drop(fs::remove_file(&unfinished)))?;
        tracing::info!(image = %image.display(), base = %base.display(), "Kept a template's image");
        Ok(base)
    }
}

/// What an image is, as long as nobody writes to it.
pub(super) fn identity(image: &Path) -> io::Result<String> {
    let m = fs::metadata(image)?;
    let (seconds, nanos) = (m.mtime(), m.mtime_nsec());
    Ok(format!(
        "{:x}-{:x}-{:x}-{seconds:x}-{nanos:x}",
        m.dev(),
        m.ino(),
        m.len()
    ))
}

/// Grows a copy of `image`, and the file system in it.
fn grow(image: &Path, copy: &Path, bytes: u64) -> Result<(), DiskError> {
    let refused = |problem: String| DiskError::Image {
        path: image.to_owned(),
        problem,
    };
    let failed = || DiskError::file("Growing", copy);
    let file = File::options()
        .read(true)
        .write(true)
        .open(copy)
        .map_err(failed())?;
    let now = file.metadata().map_err(failed())?.len();
    if bytes < now {
        let (has, asked) = (now.div_ceil(1 << 20), bytes >> 20);
        return Err(refused(format!(
            "has {has} MiB and can't be shrunk to disk_size_mb = {asked}"
        )));
    }
    let mut magic = [0; 2];
    if file.read_exact_at(&mut magic, EXT_MAGIC_AT).is_err() || magic != EXT_MAGIC {
        return Err(refused(
            "has no ext4 file system over all of it, which is all that can be grown; leave \
             disk_size_mb out, or use a larger image"
                .into(),
        ));
    }
    file.set_len(bytes).map_err(failed())?;
    drop(file);
    // resize2fs insists on it. 1 says that something was put right.
    run(image, "e2fsck", &["-f", "-p"], copy, &[0, 1])?;
    run(image, "resize2fs", &[], copy, &[0])
}

fn run(
    image: &Path,
    program: &str,
    arguments: &[&str],
    copy: &Path,
    fine: &[i32],
) -> Result<(), DiskError> {
    let mut command = Command::new(program);
    // Where e2fsprogs is, whatever the daemon was started with.
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let problem = match command.args(arguments).arg(copy).output() {
        Ok(output)
            if output
                .status
                .code()
                .is_some_and(|code| fine.contains(&code)) =>
        {
            return Ok(());
        }
        Ok(output) => {
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said).trim().to_owned();
            format!(
                "can't be grown: {program} ended with {}: {said}",
                output.status
            )
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            format!("can't be grown, because there is no {program} here; install e2fsprogs")
        }
        Err(error) => format!("can't be grown: starting {program}: {error}"),
    };
    Err(DiskError::Image {
        path: image.to_owned(),
        problem,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ext4(path: &Path, mib: u64) -> bool {
        File::create(path).unwrap().set_len(mib << 20).unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F"])
            .arg(path)
            .status();
        made.is_ok_and(|status| status.success())
    }

    /// Blocks of the file system as its super block has them.
    fn file_system_bytes(path: &Path) -> u64 {
        let mut block = [0; 1024];
        File::open(path)
            .unwrap()
            .read_exact_at(&mut block, 1024)
            .unwrap();
        let word = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().unwrap());
        u64::from(word(4)) * (1024 << word(0x18))
    }

    #[test]
    fn an_image_is_copied_once_and_grown_with_its_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        if !ext4(&image, 16) {
            return println!(
                "skipped: an_image_is_copied_once_and_grown_with_its_file_system: no mkfs.ext4"
            );
        }
        let images = [image.clone()];
        let bases = Bases::open(dir.path().join("bases"), &images).unwrap();
        let whole = bases.get(&image, None).unwrap();
        assert_eq!(fs::read(&whole).unwrap(), fs::read(&image).unwrap());
        let made = fs::metadata(&whole).unwrap().ino();
        assert_eq!(
            fs::metadata(bases.get(&image, None).unwrap())
                .unwrap()
                .ino(),
            made
        );

        let grown = bases.get(&image, Some(40)).unwrap();
        assert_eq!(fs::metadata(&grown).unwrap().len(), 40 << 20);
        assert_eq!(file_system_bytes(&grown), 40 << 20);
        assert_eq!(
            file_system_bytes(&image),
            16 << 20,
            "the image is as it was"
        );
        let error = bases.get(&image, Some(8)).unwrap_err().to_string();
        assert!(
            error.contains("16 MiB") && error.contains("disk_size_mb = 8"),
            "{error}"
        );

        // A changed image is another one, and what the old one became goes at the next start.
        assert!(ext4(&image, 24));
        assert_ne!(bases.get(&image, None).unwrap(), whole);
        assert!(whole.exists(), "somebody may use it");
        let bases = Bases::open(dir.path().join("bases"), &images).unwrap();
        assert!(!whole.exists() && !grown.exists());
        assert_eq!(
            fs::metadata(bases.get(&image, None).unwrap())
                .unwrap()
                .len(),
            24 << 20
        );
    }

    #[test]
    fn what_is_no_ext4_is_not_grown() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let bases = Bases::open(dir.path().join("bases"), &[]).unwrap();
        let error = bases.get(&image, Some(2)).unwrap_err().to_string();
        assert!(
            error.contains("ext4") && error.contains("disk_size_mb"),
            "{error}"
        );
        assert_eq!(fs::read_dir(dir.path().join("bases")).unwrap().count(), 0);
    }
}
