//! Cloud Hypervisor brought back by the bare script: it is told to receive a guest, and given one
//! over its migration socket, with memory that it asks for.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use appliance::vmm::PageRequests;
use appliance::vmm::cloud_hypervisor::protocol::{self, Command as Say, FAULTS, HEADER_BYTES};
use appliance::vmm::cloud_hypervisor::{Contents, Layout};
use appliance::vmm::memory::MemorySize;
use serde_json::json;
use uffd_engine::sys::fdpass;
use uffd_engine::sys::process::pidfd_open;

use super::bare::{Bare, Process, put, start};

impl Bare {
    /// A process whose API is open.
    pub(super) fn start_receiver(&self) -> Result<Process> {
        let socket = self.dir.join("api.sock");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(&self.program);
        command
            .arg("--api-socket")
            .arg(format!("path={}", socket.display()));
        start(&mut command, &socket)
    }

    /// Brings the guest back in a process; it runs when this returns.
    pub(super) fn give(
        &self,
        process: &mut Process,
        state: &[u8],
        size: MemorySize,
        answer: impl FnOnce(&PageRequests) -> Result<()>,
    ) -> Result<()> {
        let give = self.dir.join("give.sock");
        let _ = fs::remove_file(&give);
        let (pid, api) = (process.child.id(), &mut process.api);
        let receive = json!({
            "receiver_url": format!("unix:{}", give.display()),
            "memory_mode": "Postcopy",
        });
        let contents = Contents::unpack(state)?;
        let config = contents.config()?;
        let layout = Layout::of(&config, size)?;
        std::thread::scope(|scope| {
            let receiving = scope.spawn(move || put(api, "/api/v1/vm.receive-migration", &receive));
            let mut peer = connect(&give)?;
            say(&mut peer, Say::Start, &[])?;
            let memory = size.file()?;
            for mapping in layout.mappings() {
                let slot = mapping.slot.to_le_bytes();
                peer.write_all(&protocol::request(Say::MemoryFd, slot.len() as u64))?;
                fdpass::send(peer.as_fd(), &slot, &[memory.as_fd()])?;
                accepted(&mut peer)?;
            }
            say(&mut peer, Say::Config, &contents.config)?;
            let mut connection = UnixStream::connect(&give)?;
            connection.write_all(&FAULTS)?;
            answer(&PageRequests {
                connection: connection.into(),
                memory: memory.into(),
                pidfd: pidfd_open(pid as i32)?,
                regions: layout.regions(),
            })?;
            say(&mut peer, Say::State, &contents.state)?;
            say(&mut peer, Say::Complete, &[])?;
            let received = receiving.join();
            received.map_err(|_| anyhow!("The script's request panicked"))?
        })
    }
}

fn connect(socket: &Path) -> Result<UnixStream> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let started = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if started.elapsed() > PATIENCE => {
                return Err(error).context("Connecting to the VMM");
            }
            Err(_) => std::thread::sleep(Duration::from_micros(50)),
        }
    }
}

fn say(peer: &mut UnixStream, command: Say, payload: &[u8]) -> Result<()> {
    peer.write_all(&protocol::request(command, payload.len() as u64))?;
    peer.write_all(payload)?;
    accepted(peer).with_context(|| format!("{command:?}"))
}

fn accepted(peer: &mut UnixStream) -> Result<()> {
    let mut answer = [0; HEADER_BYTES];
    peer.read_exact(&mut answer)?;
    ensure!(protocol::says_ok(answer)?, "The VMM did not accept it");
    Ok(())
}
