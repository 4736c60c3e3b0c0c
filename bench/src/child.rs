//! A process of a run: this binary again, under a hidden subcommand, spoken to in lines of
//! JSON over its standard input and output.
//!
//! Nothing here is on the measured path: during a round the driver sleeps in [`Child::receive`].

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{self, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A running process; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Child {
    name: &'static str,
    process: process::Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Child {
    /// Starts this binary with these arguments.
    pub(crate) fn spawn<S: AsRef<OsStr>>(
        name: &'static str,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        let binary = std::env::current_exe().context("Finding this binary")?;
        let mut process = process::Command::new(binary)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("Starting the {name} process"))?;
        let to = process.stdin.take().context("A child without its pipe")?;
        let from = process.stdout.take().context("A child without its pipe")?;
        Ok(Self {
            name,
            process,
            to,
            from: BufReader::new(from),
        })
    }

    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends one message.
    pub(crate) fn send<T: Serialize>(&mut self, message: &T) -> Result<()> {
        let name = self.name;
        write_line(&mut self.to, message).with_context(|| format!("Talking to the {name} process"))
    }

    /// Waits for one message.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self, patience: Duration) -> Result<T> {
        let name = self.name;
        if self.from.buffer().is_empty() && !readable(self.from.get_ref(), patience)? {
            bail!(
                "The {name} process said nothing for {} s: a fault was not answered, or the machine stalls",
                patience.as_secs()
            );
        }
        let mut line = String::new();
        self.from
            .read_line(&mut line)
            .with_context(|| format!("Listening to the {name} process"))?;
        if line.is_empty() {
            let status = self.process.wait()?;
            bail!("The {name} process ended early ({status}); what it said is above");
        }
        serde_json::from_str(&line).with_context(|| format!("Understanding the {name} process"))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended already, which is as well.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits until a descriptor has something to read, or its peer has gone.
pub(crate) fn readable(fd: impl AsFd, patience: Duration) -> Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("Waiting for another process"),
        }
    }
}

/// Says one message to the process that started this one.
pub(crate) fn say<T: Serialize>(message: &T) -> Result<()> {
    write_line(&mut std::io::stdout().lock(), message).context("Talking to the driver")
}

/// The next message of the process that started this one; `None` when it has no more.
pub(crate) fn hear<T: DeserializeOwned>() -> Result<Option<T>> {
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .context("Listening to the driver")?;
    if line.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(&line)
        .map(Some)
        .context("Understanding the driver")
}

fn write_line<T: Serialize>(to: &mut impl Write, message: &T) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()?;
    Ok(())
}
