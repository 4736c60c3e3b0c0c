//! A daemon of the run's own, without templates, on a loopback port.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// It looks at KVM and measures faults first.
const PATIENCE: Duration = Duration::from_secs(120);

/// Ended when dropped.
pub(super) struct Daemon {
    child: Child,
    pub(super) address: SocketAddr,
    log: PathBuf,
    _place: TempDir,
}

impl Daemon {
    pub(super) fn start(thaw: &Path) -> Result<Self> {
        let place = tempfile::Builder::new()
            .prefix("bench-api-")
            .tempdir_in("/run")?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let root = place.path();
        let config = root.join("thaw.toml");
        let text = format!(
            "instance = \"bapi\"\ndata_dir = \"{0}/data\"\nrun_dir = \"{0}/run\"\n\
             [api]\nlisten = [\"{address}\"]\n[traffic]\nlisten = []\n\
             [network]\npool = \"10.250.0.0/24\"\nready_slots = 0\n",
            root.display()
        );
        fs::write(&config, text)?;
        let log = root.join("log");
        let mut command = Command::new(thaw);
        command
            .args(["serve", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        let child = command.spawn().with_context(|| {
            format!(
                "Starting {}; build it, or name it with --thaw",
                thaw.display()
            )
        })?;
        let mut daemon = Self {
            child,
            address,
            log,
            _place: place,
        };
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("The daemon ended with {status}:\n{}", daemon.said());
            }
            ensure!(
                began.elapsed() < PATIENCE,
                "The daemon isn't ready:\n{}",
                daemon.said()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(daemon)
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// It has to end well.
    pub(super) fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM)?;
        let status = self.child.wait()?;
        ensure!(
            status.success(),
            "The daemon ended with {status}:\n{}",
            self.said()
        );
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
