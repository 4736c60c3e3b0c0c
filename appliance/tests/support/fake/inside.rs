//! What answers at the guest's address: the calls of `envd` that a lifecycle needs, and some by
//! which a test puts things into the guest and finds them again.

use std::fs::File;
use std::io::{self, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use appliance::network::address::GUEST;
use appliance::vmm::launch::DISK_PATH;
use serde_json::{Value, json};

use super::cloud_hypervisor;
use super::guest::Guest;
use super::http::{self, Request};

/// Where test and guest keep a word on the disk: past what a file system would mind.
const DISK_AT: u64 = 512;

/// Serves until the process ends.
pub(crate) fn serve(guest: Arc<Guest>, metadata: Arc<Mutex<Value>>) -> io::Result<()> {
    Guest::take_address()?;
    let listener = TcpListener::bind(SocketAddr::from((GUEST, envd::protocol::PORT)))?;
    println!("envd listening on {}", listener.local_addr()?);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (guest, metadata) = (guest.clone(), metadata.clone());
            std::thread::spawn(move || {
                let _ = serve_one(&stream, &guest, &metadata);
            });
        }
    });
    Ok(())
}

fn serve_one(stream: &TcpStream, guest: &Guest, metadata: &Mutex<Value>) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(request) = http::read(&mut reader)? {
        // Nobody answers in a guest that is stopped.
        let running = guest.while_running();
        let (status, body) = answer(&request, guest, metadata);
        drop(running);
        http::send(stream, status, &body.to_string())?;
    }
    Ok(())
}

fn answer(request: &Request, guest: &Guest, metadata: &Mutex<Value>) -> (u16, Value) {
    let number = |name: &str| request.number(name);
    match (request.method.as_str(), request.route()) {
        ("GET", "/health") => (200, json!({ "version": "0.0.0" })),
        ("POST", "/init" | "/snapshot/prepare") => (204, Value::Null),
        ("GET", "/test/count") => (200, json!(guest.count())),
        ("GET", "/test/hash") => (200, json!(guest.hash().to_string())),
        ("GET", "/test/disk-limits") => (200, guest.disk_limits()),
        ("GET", "/test/metadata") => (200, metadata.lock().unwrap().clone()),
        ("POST", "/test/fill") => {
            guest.fill(number("first"), number("pages"), number("seed"));
            (200, Value::Null)
        }
        ("POST", "/test/give-back") => {
            guest.give_back(number("first"), number("pages")).unwrap();
            (200, Value::Null)
        }
        ("POST", "/test/disk") => {
            let disk = File::options().write(true).open(DISK_PATH).unwrap();
            disk.write_all_at(&number("word").to_le_bytes(), DISK_AT)
                .unwrap();
            (200, Value::Null)
        }
        ("GET", "/test/disk") => {
            let mut word = [0; 8];
            let disk = File::open(DISK_PATH).unwrap();
            disk.read_exact_at(&mut word, DISK_AT).unwrap();
            (200, json!(u64::from_le_bytes(word)))
        }
        ("POST", "/test/end") => end(number("how")),
        _ => (404, json!({ "message": "no such route" })),
    }
}

/// Ends the process in one of the ways that are told apart.
fn end(how: u64) -> ! {
    match how {
        0 => println!("reboot: Power down"),
        2 => println!("reboot: Restarting system"),
        1 => {
            println!("[    1.0] Kernel panic - not syncing: for a test");
            cloud_hypervisor::restart_if_it_is_one();
        }
        _ => {
            let signal = nix::sys::signal::Signal::try_from(how as i32).unwrap();
            nix::sys::signal::raise(signal).unwrap();
        }
    }
    std::process::exit(0)
}
