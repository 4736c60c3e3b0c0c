//! Clones by device-mapper, in an emulated machine with Debian's kernel: this program runs there
//! again, and prints what it measured. Times are the emulation's; the ratio is not.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result};
use appliance::config::DiskBackend;

use super::Subject;
use crate::args::DisksInsideArgs;
use crate::report::parts::{Bound, Part};
use crate::workload::rounds::interleaved;
use crate::{config, machine};

/// Boot, and a few hundred clones.
const LIMIT: Duration = Duration::from_secs(600);
/// What the guest may change in the two that are compared.
const COW_MIB: u64 = 128;
const RESULT: &str = "measured: ";

type Samples = Vec<(String, Vec<f64>)>;

/// Measures, or says why not.
pub(super) fn measure(config: &config::Disks) -> Result<Result<Part, String>> {
    let Some(inputs) = config.inputs.as_deref() else {
        return Ok(Err("--inputs names no directory of a kernel".into()));
    };
    if let Some(reason) = machine::missing(Some(inputs)) {
        return Ok(Err(reason));
    }
    let (rounds, image_mib) = (config.rounds.to_string(), config.image_mib.to_string());
    let arguments = [
        "disks-inside",
        "--rounds",
        &rounds,
        "--image-mib",
        &image_mib,
        "--dir",
        "/data",
    ];
    let (code, lines) = machine::Machine::new(inputs).run_self(&arguments, LIMIT);
    let result = lines.iter().find_map(|line| line.strip_prefix(RESULT));
    let result = result.with_context(|| format!("The machine measured nothing, exit {code}"))?;
    let samples: Samples = serde_json::from_str(result).context("Reading what it measured")?;
    let [small, large, all] = [0, 1, 2].map(|index: usize| samples[index].0.clone());
    let about = format!(
        "a disk over a shared image, from nothing to writable, of which {COW_MIB} MiB or all may be \
         changed (the kernel's table of changes is as large as that); its removal isn't counted; a \
         round is the median of 20; in emulation"
    );
    let part = Part::new("clone by device-mapper", about, "ms", samples)
        .ratio(&large, &small)
        .ratio_goal(Bound::AtMost(1.1))
        .ratio(&all, &small);
    Ok(Ok(part))
}

/// The part of it that runs in the machine.
pub(crate) fn inside(args: &DisksInsideArgs) -> Result<()> {
    let sizes = [args.image_mib / 16, args.image_mib];
    let images = sizes.map(|mib| args.dir.join(format!("image-{mib}")));
    for (path, mib) in images.iter().zip(sizes) {
        // Sparse: what it holds is read by nobody here.
        File::create(path).and_then(|file| file.set_len(mib << 20))?;
    }
    let start = |cow_mb| Subject::start(DiskBackend::DeviceMapper, cow_mb, &args.dir, &images);
    // One after the other: the second finds what the first has kept of the images.
    let (bounded, whole) = (start(Some(COW_MIB))?, start(None)?);
    let [small, large] = &images;
    let name = |mib: u64| format!("{mib} MiB, {COW_MIB} of it");
    let samples = interleaved(
        args.rounds,
        vec![
            (name(sizes[0]), Box::new(|| bounded.clone(small))),
            (name(sizes[1]), Box::new(|| bounded.clone(large))),
            (
                format!("{} MiB, all of it", sizes[1]),
                Box::new(|| whole.clone(large)),
            ),
        ],
    )?;
    println!("{RESULT}{}", serde_json::to_string(&samples)?);
    Ok(())
}
