//! Cloud Hypervisor's API: what may be called when, what it needs, and what it leads to.
//!
//! Source: `vmm/src/api/openapi/cloud-hypervisor.yaml` and `vmm/src/lib.rs` of Cloud Hypervisor 53 and
//! 52, which is the old one.

use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use serde_json::{Value, json};

use super::guest::{Guest, State};
use super::http::{self, Request};
use super::migration::{self, Arrived, Leaving, Slot};
use super::{Fault, asking, inside, is_old};

const ROOT: &str = "/api/v1/";

/// Where what happens is said.
static EVENTS: OnceLock<Mutex<File>> = OnceLock::new();

fn event(source: &str, name: &str) {
    let Some(events) = EVENTS.get() else { return };
    let event = json!({
        "timestamp": { "secs": 1, "nanos": 0 }, "source": source, "event": name, "properties": null,
    });
    let text = serde_json::to_string_pretty(&event).unwrap();
    let _ = write!(events.lock().unwrap(), "{text}\n\n");
}

/// Its guest restarts: nothing ends by itself then.
pub(crate) fn restart_if_it_is_one() {
    if EVENTS.get().is_some() {
        event("vm", "rebooting");
        loop {
            std::thread::park();
        }
    }
}

#[derive(Default)]
struct Machine {
    config: Option<Value>,
    guest: Option<Arc<Guest>>,
    slots: Vec<Slot>,
    migrates: bool,
}

type Refusal = Vec<String>;

fn refusal(text: &str) -> Refusal {
    vec!["Error from API".into(), text.to_owned()]
}

fn because(error: &impl ToString) -> Refusal {
    refusal(&error.to_string())
}

/// Serves the API until the process is killed.
pub(crate) fn serve(socket: &Path, events: &str) -> ! {
    let events = File::options()
        .write(true)
        .open(format!("/proc/self/fd/{events}"))
        .unwrap();
    let _ = EVENTS.set(Mutex::new(events));
    event("vmm", "starting");
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

fn serve_one(stream: &UnixStream, machine: &Arc<Mutex<Machine>>) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(request) = http::read(&mut reader)? {
        let name = request.path.strip_prefix(ROOT).unwrap_or_default();
        let fault = Fault::at(name);
        match fault {
            Some(Fault::Fail) => {
                let told = json!(refusal("it was told to fail"));
                http::send(stream, 500, &told.to_string())?;
                continue;
            }
            Some(Fault::Hang) => loop {
                std::thread::park();
            },
            Some(Fault::Die) => std::process::exit(1),
            Some(Fault::Truncate) | None => {}
        }
        let answer = match handle(machine, name, &request) {
            Ok(Value::Null) => http::answer(204, ""),
            Ok(said) => http::answer(200, &said.to_string()),
            Err(refusal) => http::answer(500, &json!(refusal).to_string()),
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

fn text<'a>(body: &'a Value, member: &str) -> &'a str {
    body[member].as_str().unwrap_or_default()
}

fn handle(machine: &Arc<Mutex<Machine>>, call: &str, request: &Request) -> Result<Value, Refusal> {
    let body = request.json();
    let wants_body = matches!(
        call,
        "vm.create" | "vm.send-migration" | "vm.receive-migration" | "vm.restore"
    );
    let method = if call == "vm.info" { "GET" } else { "PUT" };
    if request.method != method || wants_body == request.body.is_empty() {
        return Err(refusal("Bad Request"));
    }
    // One thing after the other, as in the real one.
    let mut locked = machine.lock().unwrap();
    if call == "vm.send-migration" {
        return locked.send(&body, machine.clone());
    }
    locked.handle(call, &body)
}

/// What a configuration has to have for all that comes later.
fn check(config: &Value) -> Result<State, Refusal> {
    if config["memory"]["shared"] != true {
        return Err(refusal("Local migration requires shared memory"));
    }
    if config["landlock_enable"] != true {
        return Err(refusal("this fake wants to be confined"));
    }
    if config["serial"]["mode"] != "Tty" {
        return Err(refusal("nobody sees the console"));
    }
    let (disk, net) = (&config["disks"][0], &config["net"][0]);
    if let Some(disk) = disk["path"].as_str() {
        File::open(disk).map_err(|error| refusal(&format!("{disk}: {error}")))?;
    }
    if let Some(tap) = net["tap"].as_str() {
        nix::net::if_::if_nametoindex(tap)
            .map_err(|error| refusal(&format!("Open tap device failed: {error}")))?;
    }
    Ok(State {
        huge_pages: match &config["memory"]["hugepage_size"] {
            Value::Null => false,
            size if *size == 2 << 20 && config["memory"]["hugepages"] == true => true,
            size => return Err(refusal(&format!("no huge pages of {size}"))),
        },
        memory_bytes: config["memory"]["size"]
            .as_u64()
            .ok_or_else(|| refusal("no size"))?,
        has_network: net.is_object(),
        has_disk: disk.is_object(),
        disk_limits: disk["rate_limiter_config"].clone(),
        vsock: None,
    })
}

/// A state as it is sent: text in JSON in JSON.
fn state_of(guest: &Guest) -> Value {
    let manager = json!({ "memory_ranges": { "data": [{ "gpa": 0, "length": 4096 }] } });
    let data = |state: &Value| json!({ "state": state.to_string() });
    json!({
        "snapshots": {
            "memory-manager": { "snapshots": {}, "snapshot_data": data(&manager) },
        },
        "snapshot_data": data(&json!(guest.state)),
    })
}

fn state_in(state: &Value) -> Option<State> {
    serde_json::from_str(state["snapshot_data"]["state"].as_str()?).ok()
}

impl Machine {
    fn handle(&mut self, call: &str, body: &Value) -> Result<Value, Refusal> {
        match call {
            "vm.info" => return self.info(),
            "vm.create" => {
                if self.config.is_some() {
                    return Err(refusal("VM is already created"));
                }
                check(body)?;
                self.config = Some(body.clone());
            }
            _ if self.migrates => {
                let text = "VM is currently migrating and can't be modified";
                return Err(refusal(text));
            }
            "vm.boot" => self.boot()?,
            "vm.pause" => self.change(true)?,
            "vm.resume" => self.change(false)?,
            "vm.receive-migration" => self.receive(body)?,
            "vm.restore" => self.restore(body)?,
            _ => return Err(refusal("Not Found")),
        }
        Ok(Value::Null)
    }

    fn info(&self) -> Result<Value, Refusal> {
        let config = self.config.as_ref();
        let config = config.ok_or_else(|| refusal("VM is not created"))?;
        let state = match &self.guest {
            None => "Created",
            Some(guest) if guest.is_running() => "Running",
            Some(_) => "Paused",
        };
        Ok(json!({ "config": config, "state": state, "memory_actual_size": 0 }))
    }

    fn boot(&mut self) -> Result<(), Refusal> {
        let config = self.config.as_ref();
        let config = config.ok_or_else(|| refusal("VM is not created"))?;
        let state = check(config)?;
        let kernel = text(&config["payload"], "kernel");
        let head = fs::read(kernel).map_err(|error| refusal(&format!("{kernel}: {error}")))?;
        if !head.starts_with(b"\x7fELF") {
            return Err(refusal("Cannot load the kernel image"));
        }
        self.slots = Slot::all(state.memory_bytes);
        let guest = state
            .memory_size()
            .file()
            .and_then(|file| Guest::in_file(state, file))
            .map_err(|error| because(&error))?;
        self.begin(guest, true)
    }

    fn begin(&mut self, guest: Arc<Guest>, run: bool) -> Result<(), Refusal> {
        guest.start();
        if guest.state.has_network {
            inside::serve(guest.clone(), Arc::default()).map_err(|error| because(&error))?;
        } else {
            let guest = guest.clone();
            std::thread::spawn(move || {
                loop {
                    let running = guest.while_running();
                    println!("thaw probe");
                    drop(running);
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
        }
        guest.set_running(run);
        self.guest = Some(guest);
        Ok(())
    }

    fn change(&self, stop: bool) -> Result<(), Refusal> {
        let guest = self.guest.as_ref();
        let guest = guest.ok_or_else(|| refusal("VM is not running"))?;
        if guest.is_running() != stop {
            return Err(refusal("Invalid transition"));
        }
        guest.set_running(!stop);
        Ok(())
    }

    fn send(&mut self, body: &Value, this: Arc<Mutex<Self>>) -> Result<Value, Refusal> {
        let guest = self.guest.clone();
        let guest = guest.ok_or_else(|| refusal("VM is not running"))?;
        if self.migrates {
            return Err(refusal("There is already an ongoing migration"));
        }
        if asking::is_restoring() {
            let text = "Cannot migrate while on-demand memory restore is in progress";
            return Err(refusal(text));
        }
        if body["local"] != true || guest.is_running() {
            return Err(refusal("this fake sends stopped guests, to the same host"));
        }
        let url = text(body, "destination_url");
        let path = url.strip_prefix("unix:").unwrap_or_default().to_owned();
        let config = migration::config(self.config.as_ref().unwrap(), &self.slots);
        let (slots, keeps) = (self.slots.clone(), body["preserve_source"] == true);
        let sending = move || {
            event("vm", "migration-started");
            let leaving = Leaving {
                config: &config,
                state: &state_of(&guest),
                slots: &slots,
                memory: guest.file().unwrap(),
            };
            let sent = migration::send(&path, &leaving);
            event(
                "vm",
                if sent.is_ok() {
                    "migration-finished"
                } else {
                    "migration-failed"
                },
            );
            if let Err(error) = &sent {
                println!("Migration failed: {error}");
            }
            sent
        };
        if is_old() {
            // Nothing else is done meanwhile, and a guest that was taken is none of its own.
            return match sending() {
                Ok(()) => std::process::exit(0),
                Err(error) => Err(because(&error)),
            };
        }
        self.migrates = true;
        std::thread::spawn(move || {
            if sending().is_ok() && !keeps {
                std::process::exit(0);
            }
            // Seen a little later than said.
            std::thread::sleep(Duration::from_millis(20));
            this.lock().unwrap().migrates = false;
        });
        Ok(Value::Null)
    }

    fn receive(&mut self, body: &Value) -> Result<(), Refusal> {
        if self.config.is_some() {
            return Err(refusal(
                "Can't receive a migration when a VM is already created",
            ));
        }
        let url = text(body, "receiver_url");
        let path = url.strip_prefix("unix:").unwrap_or_default();
        let requests = body["memory_mode"] == "Postcopy" && !is_old();
        let take = |arrived: Arrived, state: &Value, connection: Option<UnixStream>| {
            self.take(arrived, state, connection)
                .map_err(|refusal| refusal.join(": "))
        };
        let run = migration::receive(path, requests, take);
        let run = run.inspect_err(|reason| println!("Migration aborted: {reason}"));
        let run = run.map_err(|error| because(&error))?;
        if run {
            self.change(false)?;
        }
        Ok(())
    }

    fn take(
        &mut self,
        arrived: Arrived,
        state: &Value,
        connection: Option<UnixStream>,
    ) -> Result<(), Refusal> {
        let config = arrived.config["vm_config"].clone();
        // Devices are made by the configuration, and take their states afterwards.
        let disk_limits = check(&config)?.disk_limits;
        let state = state_in(state).ok_or_else(|| refusal("Error deserialising snapshot"))?;
        let state = State {
            disk_limits,
            ..state
        };
        let guest = Guest::in_file(state, arrived.memory).map_err(|error| because(&error))?;
        if let Some(connection) = connection {
            asking::begin(&guest, arrived.slots.clone(), connection)
                .map_err(|error| because(&error))?;
        }
        // Its devices look into the memory.
        let _ = guest.count();
        (self.config, self.slots) = (Some(config), arrived.slots);
        self.begin(guest, false)
    }

    fn restore(&mut self, body: &Value) -> Result<(), Refusal> {
        match text(body, "memory_restore_mode") {
            // An old one brings in nothing but what is asked for, and is never done.
            "OnDemand" if is_old() => asking::never_done(),
            "Copy" | "OnDemand" => {}
            _ => return Err(refusal("unknown variant")),
        }
        let url = text(body, "source_url");
        let dir = Path::new(url.strip_prefix("file://").unwrap_or_default());
        let read = |name: &str| -> Result<Value, Refusal> {
            let bytes =
                fs::read(dir.join(name)).map_err(|error| refusal(&format!("{name}: {error}")))?;
            serde_json::from_slice(&bytes).map_err(|error| because(&error))
        };
        let (config, saved) = (read("config.json")?, read("state.json")?);
        let disk_limits = check(&config)?.disk_limits;
        let state = state_in(&saved).ok_or_else(|| refusal("no state"))?;
        let state = State {
            disk_limits,
            ..state
        };
        let manager = &saved["snapshots"]["memory-manager"]["snapshot_data"]["state"];
        let manager: Value = serde_json::from_str(manager.as_str().unwrap_or_default())
            .map_err(|error| because(&error))?;
        self.slots = Slot::all(state.memory_bytes);
        let listed = manager["memory_ranges"]["data"].as_array();
        let ranges = self
            .slots
            .iter()
            .map(|slot| json!({ "gpa": slot.address, "length": slot.bytes }));
        if !listed.is_some_and(|listed| ranges.eq(listed.iter().cloned())) {
            return Err(refusal(&format!("the file has all memory, not {listed:?}")));
        }
        let loading = || -> io::Result<Arc<Guest>> {
            let source = File::open(dir.join("memory-ranges"))?;
            let file = state.memory_size().file()?;
            let mut bytes = vec![0; state.memory_bytes as usize];
            source.read_exact_at(&mut bytes, 0)?;
            let guest = Guest::in_file(state.clone(), file)?;
            guest.overwrite(&bytes);
            Ok(guest)
        };
        let guest = loading().map_err(|error| because(&error))?;
        self.config = Some(config);
        self.begin(guest, false)
    }
}
