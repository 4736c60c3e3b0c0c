//! Somebody else's handler: an executable that takes a socket and a memory file, as those in
//! Firecracker's `examples/uffd` do. It serves one VMM, so each session has a process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{PATIENCE, Served, Subject};
use crate::placement;
use crate::source::Words;

/// A handler, and its process while there is a session.
#[derive(Debug)]
pub(crate) struct Peer {
    name: String,
    program: PathBuf,
    sockets: PathBuf,
    memory: PathBuf,
    cpu: usize,
    sessions: u64,
    running: Option<Child>,
}

impl Peer {
    pub(crate) fn new(
        name: &str,
        program: &Path,
        sockets: &Path,
        memory: &Path,
        cpu: usize,
    ) -> Self {
        Self {
            name: name.to_owned(),
            program: program.to_path_buf(),
            sockets: sockets.to_path_buf(),
            memory: memory.to_path_buf(),
            cpu,
            sessions: 0,
            running: None,
        }
    }

    fn stop(&mut self) {
        if let Some(mut process) = self.running.take() {
            // It may have ended with its guest.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Subject for Peer {
    fn name(&self) -> &str {
        &self.name
    }

    /// Unknown: what counts for a peer is what its faults cost the guest.
    fn window_pages(&self) -> u64 {
        1
    }

    fn words(&self) -> Words {
        Words::OfBuild
    }

    fn expect(&mut self) -> Result<PathBuf> {
        self.sessions += 1;
        let socket = self
            .sockets
            .join(format!("{}-{}", self.name, self.sessions));
        let process = Command::new(&self.program)
            .arg(&socket)
            .arg(&self.memory)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("Starting {}", self.program.display()))?;
        placement::pin_process(process.id(), self.cpu)?;
        let process = self.running.insert(process);
        let deadline = Instant::now() + PATIENCE;
        while !listens(&socket)? {
            if let Some(status) = process.try_wait()? {
                bail!(
                    "{} ended before it listened: {status}",
                    self.program.display()
                );
            }
            if Instant::now() > deadline {
                bail!("{} doesn't listen at its socket", self.program.display());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(socket)
    }

    fn attached(&mut self) -> Result<()> {
        Ok(())
    }

    fn detach(&mut self) -> Result<Served> {
        self.stop();
        Ok(Served::default())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether somebody listens at a path; trying to connect would be the one connection that a
/// handler takes.
fn listens(socket: &Path) -> Result<bool> {
    const SO_ACCEPTCON: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix")?;
    let path = socket.to_string_lossy();
    Ok(sockets.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace();
        fields.nth(3) == Some(SO_ACCEPTCON) && line.ends_with(&*path)
    }))
}
