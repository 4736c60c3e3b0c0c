//! Firecracker's API: what may be called when, and with which members.
//!
//! Source: `src/firecracker/swagger/firecracker.yaml` of Firecracker 1.17.

use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::guest::{Guest, State};
use super::http::{self, Request};
use super::{Fault, inside, knows_reporting, memory_comes_first};

type Refusal = String;

/// Calls, their required members and the others that they may have.
const CALLS: &[(&str, &[&str], &[&str])] = &[
    (
        "PUT /machine-config",
        &["vcpu_count", "mem_size_mib"],
        &["smt", "track_dirty_pages", "huge_pages", "cpu_template"],
    ),
    (
        "PUT /boot-source",
        &["kernel_image_path"],
        &["initrd_path", "boot_args"],
    ),
    (
        "PUT /drives/rootfs",
        &["drive_id", "is_root_device"],
        &[
            "partuuid",
            "cache_type",
            "is_read_only",
            "path_on_host",
            "rate_limiter",
            "io_engine",
            "socket",
        ],
    ),
    (
        "PUT /network-interfaces/eth0",
        &["iface_id", "host_dev_name"],
        &["guest_mac", "mtu", "rx_rate_limiter", "tx_rate_limiter"],
    ),
    (
        "PUT /balloon",
        &["amount_mib", "deflate_on_oom"],
        &[
            "stats_polling_interval_s",
            "free_page_hinting",
            "free_page_reporting",
        ],
    ),
    (
        "PUT /mmds/config",
        &["network_interfaces"],
        &["version", "ipv4_address", "imds_compat"],
    ),
    ("PUT /vsock", &["guest_cid", "uds_path"], &[]),
    (
        "PATCH /drives/rootfs",
        &["drive_id"],
        &["path_on_host", "rate_limiter"],
    ),
    ("PUT /actions", &["action_type"], &[]),
    ("PATCH /vm", &["state"], &[]),
    (
        "PUT /snapshot/create",
        &["snapshot_path", "mem_file_path"],
        &["snapshot_type"],
    ),
    (
        "PUT /snapshot/load",
        &["snapshot_path", "mem_backend"],
        &[
            "track_dirty_pages",
            "resume_vm",
            "network_overrides",
            "vsock_override",
            "clock_realtime",
            "huge_pages",
        ],
    ),
];

/// Limits after a change: what isn't named stays, and a bucket without a size is none.
fn changed(mut limits: Value, change: &Value) -> Value {
    for (name, bucket) in change.as_object().into_iter().flatten() {
        if limits.is_null() {
            limits = json!({});
        }
        let limits = limits.as_object_mut().unwrap();
        if bucket["size"] == 0 {
            limits.remove(name);
        } else {
            limits.insert(name.clone(), bucket.clone());
        }
    }
    limits
}

#[derive(Default)]
struct Machine {
    memory_mib: u64,
    huge_pages: bool,
    has_kernel: bool,
    has_network: bool,
    has_disk: bool,
    disk_limits: Value,
    vsock: Option<String>,
    /// Nothing can be loaded any more.
    was_configured: bool,
    guest: Option<Arc<Guest>>,
    metadata: Arc<Mutex<Value>>,
}

/// Serves the API until the process is killed.
pub(crate) fn serve(socket: &Path) -> ! {
    let listener = UnixListener::bind(socket).unwrap();
    let machine = Arc::new(Mutex::new(Machine::default()));
    for stream in listener.incoming().flatten() {
        let machine = machine.clone();
        std::thread::spawn(move || {
            let _ = serve_one(&stream, &machine);
        });
    }
    unreachable!("a listener has no end")
}

fn serve_one(stream: &UnixStream, machine: &Mutex<Machine>) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(request) = http::read(&mut reader)? {
        let call = format!("{} {}", request.method, request.path);
        // What is asked of a guest is in the body.
        let asked = format!("{call} {}", text(&request.json(), "state"));
        let fault = Fault::at(&call).or_else(|| Fault::at(&asked));
        match fault {
            Some(Fault::Fail) => {
                http::send(stream, 400, &fault_message("it was told to fail"))?;
                continue;
            }
            Some(Fault::Hang) => loop {
                std::thread::park();
            },
            Some(Fault::Die) => std::process::exit(1),
            Some(Fault::Truncate) | None => {}
        }
        let done = machine.lock().unwrap().handle(&call, &request);
        let answer = match done {
            Ok(()) if call == "GET /" => http::answer(200, &machine.lock().unwrap().instance()),
            Ok(()) => http::answer(204, ""),
            Err(refusal) => http::answer(400, &fault_message(&refusal)),
        };
        let mut stream = stream;
        if fault.is_some() {
            stream.write_all(&answer[..answer.len() / 2])?;
            return stream.shutdown(std::net::Shutdown::Both);
        }
        stream.write_all(&answer)?;
    }
    Ok(())
}

fn fault_message(text: &str) -> String {
    json!({ "fault_message": text }).to_string()
}

fn check_members(call: &str, body: &Value) -> Result<(), Refusal> {
    if call == "PUT /mmds" {
        return Ok(());
    }
    let known = CALLS.iter().find(|(name, _, _)| *name == call);
    let (_, required, others) = known.ok_or_else(|| format!("Invalid request: {call}"))?;
    let members = body.as_object().ok_or("the body is no object")?;
    if let Some(missing) = required.iter().find(|name| !members.contains_key(**name)) {
        return Err(format!("missing field `{missing}`"));
    }
    let is_known = |name: &&String| {
        let name = name.as_str();
        let is_new = name == "free_page_reporting" && !knows_reporting();
        !is_new && (required.contains(&name) || others.contains(&name))
    };
    match members.keys().find(|name| !is_known(name)) {
        Some(unknown) => Err(format!("unknown field `{unknown}`")),
        None => Ok(()),
    }
}

fn text<'a>(body: &'a Value, member: &str) -> &'a str {
    body[member].as_str().unwrap_or_default()
}

impl Machine {
    fn instance(&self) -> String {
        let state = match &self.guest {
            None => "Not started",
            Some(guest) if guest.is_running() => "Running",
            Some(_) => "Paused",
        };
        let about = ("anonymous-instance", "1.17.0", "Firecracker");
        json!({ "id": about.0, "state": state, "vmm_version": about.1, "app_name": about.2 })
            .to_string()
    }

    fn handle(&mut self, call: &str, request: &Request) -> Result<(), Refusal> {
        if call == "GET /" {
            return Ok(());
        }
        let body = request.json();
        check_members(call, &body)?;
        match call {
            "PUT /mmds" => {
                *self.metadata.lock().unwrap() = body;
                return Ok(());
            }
            "PATCH /vm" => return self.change(text(&body, "state")),
            "PUT /snapshot/create" => return self.save(&body),
            "PUT /snapshot/load" => return self.load(&body),
            "PATCH /drives/rootfs" => {
                let guest = self.guest.as_ref().ok_or("not supported before starting")?;
                guest.limit_disk(changed(guest.disk_limits(), &body["rate_limiter"]));
                return Ok(());
            }
            _ if self.guest.is_some() => {
                return Err("The requested operation is not supported after starting".into());
            }
            _ => self.was_configured = true,
        }
        match call {
            "PUT /machine-config" => {
                self.memory_mib = body["mem_size_mib"].as_u64().ok_or("no memory")?;
                self.huge_pages = match body["huge_pages"].as_str() {
                    None | Some("None") => false,
                    Some("2M") => true,
                    Some(other) => return Err(format!("unknown variant `{other}`")),
                };
            }
            "PUT /boot-source" => {
                let kernel = text(&body, "kernel_image_path");
                let mut head = fs::read(kernel).map_err(|error| format!("{kernel}: {error}"))?;
                head.truncate(4);
                if head != b"\x7fELF" {
                    return Err("Invalid Elf magic number".into());
                }
                self.has_kernel = true;
            }
            "PUT /drives/rootfs" => {
                let disk = text(&body, "path_on_host");
                File::open(disk).map_err(|error| format!("{disk}: {error}"))?;
                self.has_disk = true;
                self.disk_limits = body["rate_limiter"].clone();
            }
            "PUT /vsock" => self.vsock = Some(text(&body, "uds_path").to_owned()),
            "PUT /network-interfaces/eth0" => {
                nix::net::if_::if_nametoindex(text(&body, "host_dev_name"))
                    .map_err(|error| format!("Open tap device failed: {error}"))?;
                self.has_network = true;
            }
            "PUT /actions" => return self.boot(),
            _ => {}
        }
        Ok(())
    }

    fn boot(&mut self) -> Result<(), Refusal> {
        if !self.has_kernel {
            return Err("Cannot start microvm without kernel configuration.".into());
        }
        let state = State {
            memory_bytes: self.memory_mib << 20,
            huge_pages: self.huge_pages,
            has_network: self.has_network,
            has_disk: self.has_disk,
            disk_limits: self.disk_limits.clone(),
            vsock: self.vsock.clone(),
        };
        let guest = Guest::boot(state).map_err(|error| error.to_string())?;
        println!("thaw probe");
        self.begin(guest, true)
    }

    fn begin(&mut self, guest: Arc<Guest>, run: bool) -> Result<(), Refusal> {
        if let Some(path) = &guest.state.vsock {
            // Bound as long as the process lives, and refused where there is one.
            let listener = UnixListener::bind(path);
            std::mem::forget(
                listener.map_err(|error| format!("Cannot bind vsock {path}: {error}"))?,
            );
        }
        if guest.state.has_network {
            inside::serve(guest.clone(), self.metadata.clone())
                .map_err(|error| format!("The guest's address: {error}"))?;
        }
        guest.set_running(run);
        self.guest = Some(guest);
        Ok(())
    }

    fn change(&self, state: &str) -> Result<(), Refusal> {
        let guest = self.guest.as_ref().ok_or("not supported before starting")?;
        guest.set_running(state == "Resumed");
        Ok(())
    }

    fn save(&self, body: &Value) -> Result<(), Refusal> {
        let guest = self.guest.as_ref().ok_or("not supported before starting")?;
        if guest.is_running() {
            return Err("save/restore unavailable while running".into());
        }
        let write_state = || {
            let state = State {
                disk_limits: guest.disk_limits(),
                ..guest.state.clone()
            };
            let state = serde_json::to_vec(&state).unwrap();
            fs::write(text(body, "snapshot_path"), state).map_err(|error| {
                format!("Cannot perform open on the snapshot backing file: {error}")
            })
        };
        if !memory_comes_first() {
            write_state()?;
        }
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(text(body, "mem_file_path"))
            .map_err(|error| format!("Cannot perform open on the memory backing file: {error}"))?;
        write_state()?;
        if text(body, "snapshot_type") != "Diff" {
            return Err("a full snapshot reads all of the memory".into());
        }
        guest
            .save_resident(&file)
            .map_err(|error| format!("Cannot write memory: {error}"))
    }

    fn load(&mut self, body: &Value) -> Result<(), Refusal> {
        if self.was_configured || self.guest.is_some() {
            return Err("Loading a microVM snapshot not allowed after configuring".into());
        }
        let bytes = fs::read(text(body, "snapshot_path")).map_err(|error| error.to_string())?;
        let state: State = serde_json::from_slice(&bytes)
            .map_err(|error| format!("Failed to restore from snapshot: {error}"))?;
        if state.has_disk {
            File::open(appliance::vmm::launch::DISK_PATH).map_err(|error| error.to_string())?;
        }
        let backend = &body["mem_backend"];
        let path = Path::new(text(backend, "backend_path"));
        let guest = match text(backend, "backend_type") {
            "Uffd" => Guest::served(state, path),
            "File" => File::open(path).and_then(|_| Guest::boot(state)),
            _ => return Err("unknown variant".into()),
        };
        let guest = guest.map_err(|error| format!("Failed to load guest memory: {error}"))?;
        self.begin(guest, body["resume_vm"] == true)
    }
}
