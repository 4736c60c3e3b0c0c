//! Cloud Hypervisor's half of a local migration, either one.
//!
//! Source: `vm-migration/src/protocol.rs` and `vmm/src/lib.rs` of Cloud Hypervisor 53.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use serde_json::{Value, json};
use uffd_engine::sys::fdpass;

use super::Fault;

pub(crate) const OK: u16 = 1;
const ERROR: u16 = 2;
pub(crate) const PAGE_FAULT: u16 = 9;
const COMMANDS: [(u16, &str); 7] = [
    (1, "Start"),
    (7, "MemoryFd"),
    (2, "Config"),
    (3, "State"),
    (5, "Complete"),
    (8, "CompletePaused"),
    (6, "Abandon"),
];

/// A part of the memory: where it is in the guest and in its file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) number: u32,
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    pub(crate) offset: u64,
}

impl Slot {
    pub(crate) fn has(&self, offset: u64) -> bool {
        (self.offset..self.offset + self.bytes).contains(&offset)
    }

    /// A guest's: one on each side of a hole, both in one file.
    pub(crate) fn all(memory_bytes: u64) -> Vec<Self> {
        let low = memory_bytes / 4 * 3;
        let slot = |number, address, bytes, offset| Self {
            number,
            address,
            bytes,
            offset,
        };
        vec![
            slot(0, 0, low, 0),
            slot(1, 4 << 30, memory_bytes - low, low),
        ]
    }

    fn of(config: &Value) -> Option<Vec<Self>> {
        let listed = config["memory_manager_data"]["guest_ram_mappings"].as_array()?;
        let slot = |entry: &Value| {
            Some(Self {
                number: entry["slot"].as_u64()? as u32,
                address: entry["gpa"].as_u64()?,
                bytes: entry["size"].as_u64()?,
                offset: entry["file_offset"].as_u64()?,
            })
        };
        listed.iter().map(slot).collect()
    }
}

/// A configuration as it goes before the state.
pub(crate) fn config(vm: &Value, slots: &[Slot]) -> Value {
    let mappings: Vec<Value> = slots
        .iter()
        .map(|slot| {
            json!({
                "slot": slot.number, "gpa": slot.address, "size": slot.bytes,
                "zone_id": "mem0", "virtio_mem": false, "file_offset": slot.offset,
            })
        })
        .collect();
    json!({
        "vm_config": vm,
        "common_cpuid": [{ "function": 0, "eax": u32::MAX }],
        "memory_manager_data": { "memory_ranges": { "data": [] }, "guest_ram_mappings": mappings },
    })
}

pub(crate) fn header(first: u16, length: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// What is given away.
pub(crate) struct Leaving<'a> {
    pub(crate) config: &'a Value,
    pub(crate) state: &'a Value,
    pub(crate) slots: &'a [Slot],
    pub(crate) memory: &'a File,
}

/// Sends a stopped guest; an error is that it was not taken.
pub(crate) fn send(path: &str, leaving: &Leaving<'_>) -> io::Result<()> {
    let socket = UnixStream::connect(path)?;
    say(&socket, "Start", &[], None)?;
    for slot in leaving.slots {
        let number = slot.number.to_le_bytes();
        say(&socket, "MemoryFd", &number, Some(leaving.memory))?;
    }
    say(
        &socket,
        "Config",
        leaving.config.to_string().as_bytes(),
        None,
    )?;
    say(&socket, "State", leaving.state.to_string().as_bytes(), None)?;
    say(&socket, "CompletePaused", &[], None)
}

fn say(mut socket: &UnixStream, name: &str, payload: &[u8], file: Option<&File>) -> io::Result<()> {
    let (command, _) = COMMANDS.iter().find(|(_, known)| *known == name).unwrap();
    let request = header(*command, payload.len() as u64);
    match Fault::at(&format!("send {name}")) {
        None => {}
        Some(Fault::Fail) => return Err(io::Error::other("it was told to fail")),
        Some(Fault::Hang) => return until_hung_up(socket),
        Some(Fault::Truncate) => {
            let whole = [&request, payload].concat();
            socket.write_all(&whole[..whole.len() / 2])?;
            return Err(io::Error::other("it was told to stop"));
        }
        Some(Fault::Die) => std::process::exit(1),
    }
    socket.write_all(&request)?;
    match file {
        Some(file) => fdpass::send(socket.as_fd(), payload, &[file.as_fd()])?,
        None => socket.write_all(payload)?,
    }
    let mut answer = [0; 16];
    socket.read_exact(&mut answer)?;
    if answer == header(OK, 0) {
        return Ok(());
    }
    Err(io::Error::other(format!("{name} was refused: {answer:?}")))
}

fn until_hung_up(mut socket: &UnixStream) -> io::Result<()> {
    let _ = io::copy(&mut socket, &mut io::sink());
    Err(io::Error::other("it was hung up on"))
}

/// What came.
pub(crate) struct Arrived {
    pub(crate) config: Value,
    pub(crate) slots: Vec<Slot>,
    pub(crate) memory: File,
}

/// Takes a guest: `take` gets it when its state comes, with the connection for page requests if
/// there is to be one; whether it is to run is the result.
pub(crate) fn receive(
    path: &str,
    requests: bool,
    mut take: impl FnMut(Arrived, &Value, Option<UnixStream>) -> Result<(), String>,
) -> Result<bool, String> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(|error| error.to_string())?;
    let (socket, _) = listener.accept().map_err(|error| error.to_string())?;
    let mut files: Vec<(u32, OwnedFd)> = Vec::new();
    let (mut expected, mut config) = (vec!["Start"], Value::Null);
    loop {
        let (name, payload) = hear(&socket, &mut files).map_err(|error| error.to_string())?;
        if !expected.contains(&name) {
            let _ = (&socket).write_all(&header(ERROR, 0));
            return Err(format!("Can't handle command {name} now"));
        }
        let json = || serde_json::from_slice::<Value>(&payload).map_err(|error| error.to_string());
        let done = match name {
            "Start" => Ok(vec!["MemoryFd"]),
            "MemoryFd" => Ok(vec!["MemoryFd", "Config"]),
            "Config" => json().map(|json| {
                config = json;
                vec!["State"]
            }),
            "State" => (|| {
                let connection = requests.then(|| connection(&listener)).transpose()?;
                take(arrived(&config, &files)?, &json()?, connection)?;
                Ok(vec!["Complete", "CompletePaused"])
            })(),
            _ => Ok(Vec::new()),
        };
        match fault(name, &socket) {
            Some(reason) => return Err(reason),
            None => {
                let status = if done.is_ok() { OK } else { ERROR };
                let _ = (&socket).write_all(&header(status, 0));
            }
        }
        expected = done?;
        if expected.is_empty() {
            return Ok(name == "Complete");
        }
    }
}

fn fault(name: &str, mut socket: &UnixStream) -> Option<String> {
    match Fault::at(&format!("receive {name}"))? {
        Fault::Fail => {
            let _ = socket.write_all(&header(ERROR, 0));
        }
        Fault::Hang => {
            let _ = until_hung_up(socket);
        }
        Fault::Truncate => {
            let _ = socket.write_all(&header(OK, 0)[..8]);
        }
        Fault::Die => std::process::exit(1),
    }
    Some("it was told to".into())
}

fn hear(
    mut socket: &UnixStream,
    files: &mut Vec<(u32, OwnedFd)>,
) -> io::Result<(&'static str, Vec<u8>)> {
    let mut head = [0; 16];
    socket.read_exact(&mut head)?;
    let number = u16::from_le_bytes([head[0], head[1]]);
    let known = COMMANDS.iter().find(|(known, _)| *known == number);
    let (_, name) = known.ok_or_else(|| io::Error::other(format!("command {number}")))?;
    let length = u64::from_le_bytes(head[8..].try_into().unwrap());
    let mut payload = vec![0; length as usize];
    if *name == "MemoryFd" {
        let received = fdpass::receive(socket.as_fd(), &mut payload)?;
        assert_eq!(received.len, payload.len());
        let slot = u32::from_le_bytes(payload[..].try_into().unwrap());
        files.extend(received.fds.into_iter().map(|fd| (slot, fd)));
    } else {
        socket.read_exact(&mut payload)?;
    }
    Ok((name, payload))
}

/// The connection for page requests says what it is for.
fn connection(listener: &UnixListener) -> Result<UnixStream, String> {
    let (mut socket, _) = listener.accept().map_err(|error| error.to_string())?;
    let mut role = [0; 2];
    socket
        .read_exact(&mut role)
        .map_err(|error| error.to_string())?;
    match u16::from_le_bytes(role) {
        2 => Ok(socket),
        role => Err(format!("invalid connection role {role}")),
    }
}

fn arrived(config: &Value, files: &[(u32, OwnedFd)]) -> Result<Arrived, String> {
    let slots = Slot::of(config).ok_or("no guest_ram_mappings")?;
    let numbers = slots.iter().map(|slot| slot.number);
    if !numbers.eq(files.iter().map(|(slot, _)| *slot)) {
        return Err("other slots than the configuration has".into());
    }
    let inode = |fd: &OwnedFd| nix::sys::stat::fstat(fd).unwrap().st_ino;
    if files.iter().any(|(_, fd)| inode(fd) != inode(&files[0].1)) {
        return Err("this fake wants all memory in one file".into());
    }
    let memory = files[0].1.try_clone().map_err(|error| error.to_string())?;
    Ok(Arrived {
        config: config.clone(),
        slots,
        memory: memory.into(),
    })
}
