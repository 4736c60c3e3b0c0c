//! Wrenn's own client package, unmodified, against a daemon with real guests.
//!
//! Installed and skipped as E2B's are; it wants Python 3.13.

mod support;

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use support::daemon::Daemon;
use support::place::Place;
use support::{clients, needs, skip};

#[test]
fn guest_wrenn_python_newest() {
    let test = "guest_wrenn_python_newest";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(test, &reason),
    };
    let python = match clients::python_since((3, 13), "wrenn", "wrenn") {
        Ok(python) => python,
        Err(reason) => return skip(test, &reason.replace('\n', " ")),
    };
    let _turn = needs::one_at_a_time();
    let place = Place::new("twrenn", 55, Some(&inputs));
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap();
    drop(port);
    let listen = format!("require_token = true\nlisten = [\"{address}\"]");
    place.reconfigure(&[("listen = []", &listen)]);
    let made = Command::new(needs::thaw())
        .args(["token", "create", "--config"])
        .arg(&place.config)
        .output()
        .unwrap();
    let token = String::from_utf8(made.stdout).unwrap();
    let daemon = Daemon::start(&place);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/wrenn_client.py");
    let output = Command::new("timeout")
        .arg("600")
        .arg(&python.program)
        .arg(script)
        .env("WRENN_API_KEY", token.trim())
        .env("WRENN_BASE_URL", format!("http://{address}/api"))
        .output()
        .unwrap();
    python.passed("wrenn", &output);
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}
