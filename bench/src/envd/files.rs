//! One file, copied by `cp`, uploaded and downloaded, round by round.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use super::Files;
use super::client::Daemon;
use super::idle;
use crate::report::ratio::median;

pub(super) fn measure(daemon: &Daemon, dir: &Path, mib: u64, rounds: usize) -> Result<Files> {
    let (source, target) = (dir.join("source"), dir.join("target"));
    let mut random = fastrand::Rng::with_seed(mib);
    let block: Vec<u8> = std::iter::repeat_with(|| random.u8(..))
        .take(1 << 20)
        .collect();
    let mut file = File::create(&source).context("Making the file")?;
    for _ in 0..mib {
        io::Write::write_all(&mut file, &block)?;
    }
    file.sync_all()?;
    let length = mib << 20;
    let (mut cp_s, mut upload_s, mut download_s) = (Vec::new(), Vec::new(), Vec::new());
    // The first round is not counted: it finds the file in the cache, and the target's blocks free.
    for round in 0..=rounds {
        let cp = timed(&target, length, || {
            let status = Command::new("cp").arg(&source).arg(&target).status()?;
            ensure!(status.success(), "cp ended with {status}");
            Ok(())
        })?;
        let upload = timed(&target, length, || {
            let mut connection = daemon.connect()?;
            let line = format!("POST /files?path={}", target.display());
            let headers = "content-type: application/octet-stream\r\n";
            connection.send(&line, headers, &mut File::open(&source)?, length)?;
            connection.receive(&mut io::sink())?;
            Ok(())
        })?;
        let download = timed(&target, length, || {
            let mut connection = daemon.connect()?;
            let line = format!("GET /files?path={}", source.display());
            connection.send(&line, "", &mut io::empty(), 0)?;
            connection.receive(&mut File::create(&target)?)?;
            Ok(())
        })?;
        if round > 0 {
            cp_s.push(cp);
            upload_s.push(upload);
            download_s.push(download);
        }
    }
    let quotients = |seconds: &[f64]| -> Vec<f64> {
        seconds
            .iter()
            .zip(&cp_s)
            .map(|(ours, cp)| ours / cp)
            .collect()
    };
    Ok(Files {
        mib,
        upload_ratio: median(&quotients(&upload_s)),
        download_ratio: median(&quotients(&download_s)),
        peak_rss_kib: idle::field(daemon.pid(), "status", "VmHWM")?,
        cp_s,
        upload_s,
        download_s,
    })
}

/// Seconds of a copy onto a target that isn't there.
fn timed(target: &Path, length: u64, copy: impl FnOnce() -> Result<()>) -> Result<f64> {
    match fs::remove_file(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let started = Instant::now();
    copy()?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(
        fs::metadata(target)?.len() == length,
        "The copy is not complete"
    );
    Ok(seconds)
}
