//! Clones by reflink, on an XFS made for the run in a file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use appliance::config::DiskBackend;
use appliance::sys::loop_device::LoopDevice;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Subject, write_image, write_image_in_one};
use crate::config;
use crate::report::parts::{Bound, Part};
use crate::workload::rounds::interleaved;

/// Measures, or says why not.
pub(super) fn measure(config: &config::Disks, dir: &Path) -> Result<Result<Part, String>> {
    let (large, small) = (config.image_mib, config.image_mib / 16);
    // In two allocation groups, each with room for all images: on a disk of a real host groups are
    // so large that an image lies in one of them, and its extents end at no group's end.
    let xfs = match Xfs::mount(dir, large * 6) {
        Ok(xfs) => xfs,
        Err(reason) => return Ok(Err(reason)),
    };
    let images = [small, large].map(|mib| (xfs.path.join(format!("image-{mib}")), mib));
    for (path, mib) in &images {
        write_image_in_one(path, *mib, config.seed)?;
    }
    let written = xfs.path.join("written");
    write_image(&written, large, config.seed)?;
    let reflinked = Subject::start(DiskBackend::Reflink, None, &xfs.path, &[])?;
    let copied = Subject::start(DiskBackend::Copy, None, dir, &[])?;
    let copy_source = dir.join("copied");
    write_image(&copy_source, 16, config.seed)?;
    let name = |mib: u64| format!("{mib} MiB");
    let piecewise = format!("{large} MiB, written piece by piece");
    let samples = interleaved(
        config.rounds,
        vec![
            (name(small), Box::new(|| reflinked.clone(&images[0].0))),
            (name(large), Box::new(|| reflinked.clone(&images[1].0))),
            (piecewise.clone(), Box::new(|| reflinked.clone(&written))),
            (
                "copy of 16 MiB".into(),
                Box::new(|| copied.clone(&copy_source)),
            ),
        ],
    )?;
    let files = [&images[0].0, &images[1].0, &written];
    let [first, second, third] = files.map(|path| extents_of(path));
    let about = format!(
        "a disk from an image without holes, on XFS on a loop device; its removal isn't counted; a \
         round is the median of 20; the images have {first}, {second} and {third} extents"
    );
    let part = Part::new("clone by reflink", about, "ms", samples)
        .ratio(&name(large), &name(small))
        .ratio_goal(Bound::AtMost(1.1))
        .ratio(&piecewise, &name(small));
    Ok(Ok(part))
}

/// How many extents a file has, as `filefrag` counts them.
fn extents_of(path: &Path) -> String {
    let said = Command::new("filefrag").arg(path).output();
    let said = said.map_or_else(
        |_| String::new(),
        |said| String::from_utf8_lossy(&said.stdout).into_owned(),
    );
    let count = said.rsplit_once(": ").map(|(_, count)| count);
    let count = count.and_then(|count| count.split(' ').next());
    count.unwrap_or("an unknown number of").to_owned()
}

/// A mounted XFS; unmounted when it is dropped.
struct Xfs {
    path: PathBuf,
    device: LoopDevice,
}

impl Xfs {
    fn mount(dir: &Path, mib: u64) -> Result<Self, String> {
        let (image, path) = (dir.join("xfs"), dir.join("mounted"));
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: std::io::Error| format!("{what}: {error}")
        };
        let file = File::create(&image).and_then(|file| file.set_len(mib << 20));
        file.map_err(failed("making a file"))?;
        let made = Command::new("mkfs.xfs")
            .args(["-q", "-d", "agcount=2"])
            .arg(&image)
            .output();
        let made = made.map_err(failed("no mkfs.xfs; install xfsprogs"))?;
        if !made.status.success() {
            return Err(String::from_utf8_lossy(&made.stderr).into_owned());
        }
        let file = File::options().read(true).write(true).open(&image);
        let device = file
            .and_then(|file| LoopDevice::attach(&file, false))
            .map_err(failed("attaching a loop device"))?;
        let xfs = Self { path, device };
        let none: Option<&str> = None;
        fs::create_dir(&xfs.path)
            .and_then(|()| {
                let source = Some(&device.path()).cloned();
                Ok(mount(
                    source.as_ref(),
                    &xfs.path,
                    Some("xfs"),
                    MsFlags::empty(),
                    none,
                )?)
            })
            .map_err(failed("mounting XFS"))?;
        Ok(xfs)
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = self.device.release();
    }
}
