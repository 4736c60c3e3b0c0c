//! The guest that is brought back: a few instructions that print, or a Linux with envd.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use appliance::guest::Guest as Envd;
use appliance::vmm::{GuestShape, Machine, cloud_hypervisor, firecracker};
use envd::protocol;

use super::PATIENCE;
use crate::config::{self, Vmm};

const HANDMADE_MB: u32 = 64;
const LINUX_MB: u32 = 256;
/// An emulated machine inside another takes its time.
const BOOT: Duration = Duration::from_secs(600);
/// How long an attempt to connect may take: a guest that was just brought back may lose the first
/// packet, and the kernel would repeat it only after a second.
const ATTEMPT: Duration = Duration::from_millis(250);
/// What the hand-made guest says first, and its VMM never.
pub(super) const FIRST_WORD: &str = "~";

/// What is brought back.
pub(super) struct Guest {
    pub(super) shape: GuestShape,
    /// What its disk holds as long as nothing has written to it, and when the build was made.
    image: PathBuf,
    is_linux: bool,
}

impl Guest {
    /// Lays out what it starts from.
    pub(super) fn lay_out(config: &config::Restore, dir: &Path) -> Result<Self> {
        let image = dir.join("image");
        let (kernel, initrd) = if let Some(inputs) = &config.inputs {
            let base = inputs.join("base.ext4");
            fs::copy(&base, &image)
                .with_context(|| format!("Copying {}: image-build makes it", base.display()))?;
            (inputs.join("vmlinuz"), inputs.join("initrd.img"))
        } else {
            fs::write(&image, vec![0; 1 << 20])?;
            let (kernel, initrd) = (dir.join("kernel"), dir.join("initrd"));
            fs::write(&kernel, handmade(&config.vmm)?)?;
            fs::write(&initrd, b"none")?;
            (kernel, initrd)
        };
        let is_linux = config.inputs.is_some();
        let shape = GuestShape {
            vcpus: 1,
            memory_mb: if is_linux { LINUX_MB } else { HANDMADE_MB },
            huge_pages: config.huge_pages,
            kernel,
            initrd,
            cmdline: if is_linux {
                "quiet".into()
            } else {
                String::new()
            },
        };
        Ok(Self {
            shape,
            image,
            is_linux,
        })
    }

    /// What ends a restore.
    pub(super) const fn answer(&self) -> &'static str {
        if self.is_linux {
            "until envd answers"
        } else {
            "until its first word"
        }
    }

    /// The same, for the line that says what was measured.
    pub(super) const fn about(&self) -> &'static str {
        if self.is_linux {
            "p50, from the request to the guest's answer over its network"
        } else {
            "p50, from the request to what the guest says on its serial port"
        }
    }

    pub(super) const fn is_linux(&self) -> bool {
        self.is_linux
    }

    /// Puts the disk at its place, as the build knows it.
    pub(super) fn lay_disk(&self, at: &Path) -> Result<()> {
        // The same file again, which may be mounted somewhere.
        fs::copy(&self.image, at).context("Laying out the disk")?;
        Ok(())
    }

    /// Waits until a booted one is ready to be saved.
    pub(super) async fn settle(&self, address: Ipv4Addr) -> Result<()> {
        if !self.is_linux {
            tokio::time::sleep(Duration::from_millis(100)).await;
            return Ok(());
        }
        let envd = Envd::at(address);
        envd.wait_until_up(BOOT).await?;
        envd.prepare(PATIENCE).await?;
        Ok(())
    }

    /// What its disk holds now that it is stopped is what each restore finds.
    pub(super) fn keep_disk(&self, disk: &Path) -> Result<()> {
        fs::copy(disk, &self.image).context("Keeping the disk")?;
        Ok(())
    }

    /// Waits for the first answer of one that was brought back.
    pub(super) async fn answered(&self, machine: &dyn Machine, address: Ipv4Addr) -> Result<()> {
        if self.is_linux {
            return ask(address);
        }
        let console = machine.console();
        ensure!(console.wait_for(FIRST_WORD).await, "The guest says nothing");
        Ok(())
    }
}

/// Asks envd until it answers.
pub(super) fn ask(address: Ipv4Addr) -> Result<()> {
    let started = Instant::now();
    loop {
        match attempt(SocketAddr::from((address, protocol::PORT))) {
            Ok(()) => return Ok(()),
            Err(error) if started.elapsed() > PATIENCE => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn attempt(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, ATTEMPT).context("Connecting to envd")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let path = protocol::HEALTH_PATH;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n"
    )?;
    let mut status = [0; 12];
    stream
        .read_exact(&mut status)
        .context("Reading envd's answer")?;
    ensure!(
        status.starts_with(b"HTTP/1.1 2"),
        "envd answered {}",
        String::from_utf8_lossy(&status)
    );
    Ok(())
}

/// Touches 64 pages and says `~~`, which no VMM says itself, over and over; not so often that what reads it is what is measured.
/// In 64-bit mode for the one, in 32-bit mode for the other.
fn handmade(vmm: &Vmm) -> Result<Vec<u8>> {
    Ok(match vmm {
        Vmm::Firecracker(_) => firecracker::probe_guest::elf_around(&[
            0x48, 0xC7, 0xC6, 0x00, 0x00, 0x00, 0x01, // again: mov rsi, 0x1000000
            0xB9, 0x40, 0x00, 0x00, 0x00, // mov ecx, 64
            0x48, 0xFF, 0x06, // page: inc qword [rsi]
            0x48, 0x81, 0xC6, 0x00, 0x10, 0x00, 0x00, // add rsi, 4096
            0xFF, 0xC9, // dec ecx
            0x75, 0xF2, // jne page
            0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
            0xB0, b'~', 0xEE, 0xB0, b'~', 0xEE, 0xB0, b'\n', 0xEE, // say "~~\n"
            0xB9, 0x20, 0x4E, 0x00, 0x00, // mov ecx, 20000
            0xFF, 0xC9, // wait: dec ecx
            0x75, 0xFC, // jne wait
            0xEB, 0xCE, // jmp again
        ]),
        Vmm::CloudHypervisor(_) => cloud_hypervisor::probe_guest::elf_around(&[
            0xBE, 0x00, 0x00, 0x00, 0x01, // again: mov esi, 0x1000000
            0xB9, 0x40, 0x00, 0x00, 0x00, // mov ecx, 64
            0xFF, 0x06, // page: inc dword [esi]
            0x81, 0xC6, 0x00, 0x10, 0x00, 0x00, // add esi, 4096
            0x49, // dec ecx
            0x75, 0xF5, // jne page
            0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
            0xB0, b'~', 0xEE, 0xB0, b'~', 0xEE, 0xB0, b'\n', 0xEE, // say "~~\n"
            0xB9, 0x20, 0x4E, 0x00, 0x00, // mov ecx, 20000
            0x49, // wait: dec ecx
            0x75, 0xFD, // jne wait
            0xEB, 0xD4, // jmp again
        ]),
        Vmm::Qemu { .. } => bail!("QEMU's guest needs --inputs"),
    })
}
