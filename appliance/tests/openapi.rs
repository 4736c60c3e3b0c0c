//! The API against its own document: requests that schemathesis makes up, on a daemon without
//! guests. No answer is a failure of ours, and none is other than the document says.

mod support;

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use support::daemon::Daemon;
use support::place::Place;
use support::{clients, needs, skip};

#[test]
fn made_up_requests_are_answered_as_documented() {
    let test = "made_up_requests_are_answered_as_documented";
    if let Err(reason) = needs::for_daemons() {
        return skip(test, &reason);
    }
    let python = match clients::python("schemathesis", "schemathesis") {
        Ok(python) => python,
        Err(reason) => return skip(test, &reason.replace('\n', " ")),
    };
    let place = Place::new("topenapi", 47, None);
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap();
    drop(port);
    place.reconfigure(&[("listen = []", &format!("listen = [\"{address}\"]"))]);
    let daemon = Daemon::start(&place);
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../http-api/openapi.json");
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,\
                  response_schema_conformance";
    let output = Command::new("timeout")
        .arg("600")
        .arg(python.program.with_file_name("schemathesis"))
        .arg("run")
        .arg(document)
        .args(["--url", &format!("http://{address}")])
        .args(["--checks", checks, "--phases", "examples,coverage,fuzzing"])
        .args(["--max-examples", "20", "--seed", "7", "--workers", "1"])
        .args(["--request-timeout", "30", "--max-time", "120"])
        // Drained, the daemon rightly answers 503; events never end.
        .args([
            "--exclude-path",
            "/v1/host/drain",
            "--exclude-path",
            "/v1/events",
        ])
        .current_dir(&place.root)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("schemathesis {}\n{said}", python.version);
    assert!(output.status.success(), "{said}");
    daemon.stop();
}
