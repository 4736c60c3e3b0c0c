//! The same VMM brought back by a bare script: its namespaces are made beforehand, on a thread of
//! its own; then one process, one socket, and the same calls, blocking. Here with Firecracker's
//! calls; the others' are in `bare_cloud` and `bare_qemu`.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use appliance::network::address::TAP;
use appliance::vmm::launch::DISK_PATH;
use appliance::vmm::qemu::Qemu;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Value, json};

use super::guest::FIRST_WORD;

/// What it says.
pub(super) enum Calls {
    Firecracker,
    CloudHypervisor,
    /// To this QEMU, put together in the same way.
    Qemu(Qemu),
}

/// The script.
pub(super) struct Bare {
    pub(super) program: PathBuf,
    pub(super) dir: PathBuf,
}

impl Bare {
    /// Takes the calling thread into the namespaces that the VMM needs.
    pub(super) fn on_this_thread(
        program: &Path,
        dir: &Path,
        namespace: &Path,
        disk: &Path,
    ) -> Result<Self> {
        setns(fs::File::open(namespace)?, CloneFlags::CLONE_NEWNET)?;
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
        mount(Some(disk), DISK_PATH, none, MsFlags::MS_BIND, none)?;
        fs::create_dir_all(dir)?;
        Ok(Self {
            program: program.to_owned(),
            dir: dir.to_owned(),
        })
    }

    pub(super) fn handoff(&self) -> PathBuf {
        self.dir.join("uffd.sock")
    }

    /// A process that waits for a guest. A QEMU would have to know which.
    pub(super) fn ahead(&self, calls: &Calls) -> Result<Option<Process>> {
        match calls {
            Calls::Firecracker => self.start().map(Some),
            Calls::CloudHypervisor => self.start_receiver().map(Some),
            Calls::Qemu(_) => Ok(None),
        }
    }

    /// A process whose API is open.
    pub(super) fn start(&self) -> Result<Process> {
        let socket = self.dir.join("api.sock");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(&self.program);
        command
            .arg("--api-sock")
            .arg(&socket)
            .args(["--level", "Warning"]);
        start(&mut command, &socket)
    }

    /// Brings the guest back in a process; it runs when this returns.
    pub(super) fn load(&self, process: &mut Process, state: &[u8]) -> Result<()> {
        let file = self.dir.join("state");
        fs::write(&file, state)?;
        let known = json!({ "sandbox_id": "bench", "template_id": "bench" });
        put(&mut process.api, "/mmds", &known)?;
        let load = json!({
            "snapshot_path": file,
            "mem_backend": { "backend_type": "Uffd", "backend_path": self.handoff() },
            "resume_vm": true,
            "network_overrides": [{ "iface_id": "eth0", "host_dev_name": TAP }],
        });
        put(&mut process.api, "/snapshot/load", &load)
    }
}

/// A VMM of the script's.
pub(super) struct Process {
    pub(super) child: Child,
    pub(super) api: UnixStream,
}

impl Process {
    /// Waits for the guest's first word.
    pub(super) fn answer(&mut self) -> Result<()> {
        let output = self.child.stdout.as_mut().context("It is piped")?;
        let mut said = [0];
        while said != *FIRST_WORD.as_bytes() {
            output.read_exact(&mut said)?;
        }
        Ok(())
    }
}

impl Drop for Process {
    /// It has nothing to do after what was measured, or after a failure.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a VMM and waits for its API.
pub(super) fn start(command: &mut Command, socket: &Path) -> Result<Process> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("Starting {command:?}"))?;
    loop {
        match UnixStream::connect(socket) {
            Ok(api) => return Ok(Process { child, api }),
            Err(_) if child.try_wait()?.is_some() => bail!("The VMM ended at its start"),
            Err(_) => std::thread::sleep(Duration::from_micros(50)),
        }
    }
}

pub(super) fn put(api: &mut UnixStream, path: &str, body: &Value) -> Result<()> {
    let body = body.to_string();
    write!(
        api,
        "PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    // The answer has no body unless it is an error.
    let mut answer = [0; 4096];
    let length = api.read(&mut answer)?;
    let text = String::from_utf8_lossy(&answer[..length]);
    ensure!(text.starts_with("HTTP/1.1 204"), "PUT {path}: {text}");
    Ok(())
}
