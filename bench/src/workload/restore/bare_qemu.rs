//! QEMU brought back by the bare script: its own command line, without what is made for it at the paths that
//! all VMMs know; then the same commands over its control socket, blocking.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use appliance::vmm::launch::{Mount, descriptor};
use appliance::vmm::qemu::Qemu;
use appliance::vmm::qemu::command::{self, QMP_FD, RAM_FD, Start};
use appliance::vmm::{GuestShape, Place};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::{Value, json};
use uffd_engine::sys::fdpass;

use super::bare::{Bare, Process};

impl Bare {
    /// Starts a process and brings the guest back in it; it runs when this returns.
    pub(super) fn bring_back(
        &self,
        qemu: &Qemu,
        shape: &GuestShape,
        place: &Place,
        state: &[u8],
    ) -> Result<Process> {
        let ram = shape.memory().file()?;
        let socket = self.dir.join("qmp.sock");
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        let mut command = self.command(qemu, shape, place, &ram, &listener)?;
        let child = command.spawn().context("Starting QEMU")?;
        let api = UnixStream::connect(&socket)?;
        drop(listener);
        let process = Process { child, api };
        load(&process.api, state)?;
        Ok(process)
    }

    fn command(
        &self,
        qemu: &Qemu,
        shape: &GuestShape,
        place: &Place,
        ram: &File,
        listener: &UnixListener,
    ) -> Result<Command> {
        let metadata = ram.metadata()?;
        let start = Start::Restore {
            preload: &qemu.preload,
            ram_inode: &format!("{}:{}", metadata.dev(), metadata.ino()),
        };
        let launch = command::launch(&qemu.program, qemu.accelerator, shape, place, start);
        let kept = [(RAM_FD, ram.as_fd()), (QMP_FD, listener.as_fd())];
        for (_, fd) in kept {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        let here = |text: &str| {
            let mut text = text.to_owned();
            for (number, fd) in kept {
                text = text.replace(&descriptor(number), &fd.as_raw_fd().to_string());
            }
            for mount in &launch.mounts {
                if let Mount::Bind { from, at } = mount {
                    text = text.replace(path(at), path(from));
                }
            }
            text
        };
        let mut command = Command::new(&launch.program);
        command
            .args(launch.args.iter().map(|argument| here(argument)))
            .envs(launch.env.iter().map(|(name, value)| (name, here(value))))
            .env("THAW_UFFD_SOCKET", self.handoff())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(command)
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// The device state, with the memory left to whoever serves it; then the guest goes on.
fn load(api: &UnixStream, state: &[u8]) -> Result<()> {
    let mut qmp = Qmp {
        stream: api,
        lines: BufReader::new(api),
    };
    qmp.read()?;
    qmp.execute("qmp_capabilities", &json!({}), &[])?;
    let on = |capability| json!({ "capability": capability, "state": true });
    let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
    qmp.execute("migrate-set-capabilities", &capabilities, &[])?;
    let parameters = json!({ "max-bandwidth": 1u64 << 40 });
    qmp.execute("migrate-set-parameters", &parameters, &[])?;
    let (mut ours, theirs) = UnixStream::pair()?;
    qmp.execute("getfd", &json!({ "fdname": "state" }), &[theirs.as_fd()])?;
    drop(theirs);
    qmp.execute("migrate-incoming", &json!({ "uri": "fd:state" }), &[])?;
    ours.write_all(state)?;
    drop(ours);
    loop {
        let message = qmp.read()?;
        if message["event"] != "MIGRATION" {
            continue;
        }
        match message["data"]["status"].as_str() {
            Some("completed") => break,
            Some("failed") => bail!("QEMU could not load the device state"),
            _ => {}
        }
    }
    qmp.execute("cont", &json!({}), &[])
}

struct Qmp<'a> {
    stream: &'a UnixStream,
    lines: BufReader<&'a UnixStream>,
}

impl Qmp<'_> {
    fn execute(&mut self, command: &str, arguments: &Value, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        fdpass::send(self.stream.as_fd(), line.as_bytes(), fds)?;
        loop {
            let message = self.read()?;
            if let Some(error) = message.get("error") {
                bail!("{command}: {}", error["desc"]);
            }
            if message.get("return").is_some() {
                return Ok(());
            }
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.lines.read_line(&mut line)? > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }
}
