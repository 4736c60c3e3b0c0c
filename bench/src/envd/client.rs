//! A daemon of our own, and one kept-open connection to it: no HTTP library in what is measured.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

/// Killed when dropped.
#[derive(Debug)]
pub(super) struct Daemon {
    child: Child,
    address: String,
}

impl Daemon {
    pub(super) fn start(envd: &Path) -> Result<Self> {
        let mut child = Command::new(envd)
            .args(["--listen", "127.0.0.1:0", "--borrowed-machine"])
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("Starting {}", envd.display()))?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("No output of envd")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let address = line
            .trim()
            .rsplit(' ')
            .next()
            .unwrap_or_default()
            .to_owned();
        Ok(Self { child, address })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn connect(&self) -> Result<Connection> {
        let stream = TcpStream::connect(&self.address).context("Connecting to envd")?;
        stream.set_nodelay(true)?;
        Ok(Connection(BufReader::with_capacity(256 * 1024, stream)))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Used for one request after the other.
#[derive(Debug)]
pub(super) struct Connection(BufReader<TcpStream>);

impl Connection {
    /// Sends a request with a body of that length.
    pub(super) fn send(
        &mut self,
        line: &str,
        headers: &str,
        body: &mut dyn io::Read,
        length: u64,
    ) -> Result<()> {
        let stream = self.0.get_mut();
        let head =
            format!("{line} HTTP/1.1\r\nhost: guest\r\ncontent-length: {length}\r\n{headers}\r\n");
        stream.write_all(head.as_bytes())?;
        let mut buffer = vec![0; usize::try_from(length.clamp(1, 256 * 1024))?];
        loop {
            match body.read(&mut buffer)? {
                0 => return Ok(()),
                count => stream.write_all(&buffer[..count])?,
            }
        }
    }

    /// Takes the answer's body; gives its length.
    pub(super) fn receive(&mut self, into: &mut dyn io::Write) -> Result<u64> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        ensure!(line.starts_with("HTTP/1.1 200"), "envd answered {line:?}");
        let (mut length, mut chunked) = (0, false);
        loop {
            line.clear();
            self.0.read_line(&mut line)?;
            let lower = line.trim().to_ascii_lowercase();
            match lower.split_once(": ") {
                None => break,
                Some(("content-length", value)) => length = value.parse()?,
                Some(("transfer-encoding", value)) => chunked = value == "chunked",
                Some(_) => {}
            }
        }
        if !chunked {
            return self.copy(length, into).map(|()| length);
        }
        let mut total = 0;
        loop {
            line.clear();
            self.0.read_line(&mut line)?;
            let length = u64::from_str_radix(line.trim(), 16).context("A chunk's length")?;
            self.copy(length, into)?;
            self.0.read_exact(&mut [0; 2])?;
            if length == 0 {
                return Ok(total);
            }
            total += length;
        }
    }

    fn copy(&mut self, length: u64, into: &mut dyn io::Write) -> Result<()> {
        let copied = io::copy(&mut (&mut self.0).take(length), into)?;
        if copied < length {
            bail!("envd's answer ended after {copied} of {length} bytes");
        }
        Ok(())
    }
}
