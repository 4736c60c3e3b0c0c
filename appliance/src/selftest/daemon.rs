//! The trial's own daemon: its configuration, its process, its log.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::process::{Child, Command};

use crate::args::TryArgs;
use crate::client::Client;

/// Names the trial's namespaces and links.
pub(super) const INSTANCE: &str = "thawtry";
/// The probe of KVM alone may take ten seconds.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Where a trial happens.
pub(super) struct Workplace {
    pub(super) data: PathBuf,
    pub(super) run: PathBuf,
    pub(super) config: PathBuf,
    pub(super) log: PathBuf,
}

impl Workplace {
    pub(super) fn new(args: &TryArgs, root: &Path) -> Result<Self> {
        let inputs = args.inputs.canonicalize()?;
        fs::create_dir_all(root).with_context(|| format!("Making {}", root.display()))?;
        let root = root.canonicalize()?;
        let workplace = Self {
            data: root.join("data"),
            // Unix socket paths are short; a deep checkout must not matter.
            run: PathBuf::from("/run").join(INSTANCE),
            config: root.join("thaw.toml"),
            log: root.join("daemon.log"),
        };
        let text = configuration(&workplace, &inputs, args.memory_mb);
        fs::write(&workplace.config, text)
            .with_context(|| format!("Writing {}", workplace.config.display()))?;
        Ok(workplace)
    }

    /// The last lines of the log, for a failure.
    pub(super) fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

fn configuration(workplace: &Workplace, inputs: &Path, memory_mb: u32) -> String {
    let quoted = |path: &Path| toml::Value::String(path.display().to_string()).to_string();
    format!(
        "# Written by `thaw try`.\n\
         instance = \"{INSTANCE}\"\n\
         data_dir = {data}\n\
         run_dir = {run}\n\
         [traffic]\n\
         listen = []\n\
         [api]\n\
         listen = []\n\
         [network]\n\
         pool = \"10.214.0.0/16\"\n\
         [[template]]\n\
         name = \"base\"\n\
         kernel = {kernel}\n\
         initrd = {initrd}\n\
         disk = {disk}\n\
         memory_mb = {memory_mb}\n",
        data = quoted(&workplace.data),
        run = quoted(&workplace.run),
        kernel = quoted(&inputs.join("vmlinuz")),
        initrd = quoted(&inputs.join("initrd.img")),
        disk = quoted(&inputs.join("base.ext4")),
    )
}

/// A running daemon; killed if it is dropped before it is stopped.
pub(super) struct Daemon {
    child: Child,
    pub(super) client: Client,
    pub(super) took: Duration,
}

impl Daemon {
    pub(super) async fn start(workplace: &Workplace) -> Result<Self> {
        let started = Instant::now();
        let log = File::create(&workplace.log)
            .with_context(|| format!("Writing {}", workplace.log.display()))?;
        let mut child = Command::new("/proc/self/exe")
            .arg("serve")
            .arg("--config")
            .arg(&workplace.config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context("Starting the daemon")?;
        let client = Client::new(&workplace.run.join("api.sock"));
        let mut announced = false;
        while client.ready().await.is_err() {
            if let Some(status) = child.try_wait()? {
                bail!(
                    "The daemon ended at start ({status}):\n{}",
                    workplace.log_tail()
                );
            }
            if started.elapsed() > START_TIMEOUT {
                bail!(
                    "The daemon is not ready after {} s",
                    START_TIMEOUT.as_secs()
                );
            }
            if started.elapsed() > Duration::from_secs(2) && !announced {
                eprintln!(
                    "· starting the daemon (the first time it tries whether KVM runs guests) …"
                );
                announced = true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Self {
            child,
            client,
            took: started.elapsed(),
        })
    }

    /// Tells it to stop and waits until it has.
    pub(super) async fn stop(&mut self) -> Result<Duration> {
        let started = Instant::now();
        let Some(pid) = self.child.id() else {
            bail!("The daemon has ended by itself")
        };
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid as i32),
            nix::sys::signal::Signal::SIGTERM,
        )?;
        let status = tokio::time::timeout(STOP_TIMEOUT, self.child.wait())
            .await
            .with_context(|| {
                format!("The daemon runs still after {} s", STOP_TIMEOUT.as_secs())
            })??;
        if !status.success() {
            bail!("The daemon stopped with {status}");
        }
        Ok(started.elapsed())
    }
}
